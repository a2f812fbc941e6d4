"""The pages that people read first: what they name exists, what they show runs, what they print is true."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from bench import demo_page
from stages.runtime import config as configuration
from tests.support.helpers import ROOT, Forker
from tests.support.pages import Block, blocks, furnish, run_block

PAGES = ("README.md", "docs/guide.md")
MATHS = (ROOT / "docs/maths.md").read_text()
NAMED = re.compile(r"`((?:dualkl|cache|stages)(?:\.\w+)+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FORMULA = re.compile(r"```math\n(.*?)```|\$`(.*?)`\$", re.DOTALL)
OPTIONS = {
    "config",
    "gpus",
    "gpu_memory",
    "student",
    "teacher",
    "data",
    "out",
    "follow",
    "merge",
    "push",
    "help",
}
PROGRAMS = {"dualkl", "pip", "torchrun", "accelerate", "sbatch", "vllm", "lm_eval", "python"}


# What pages name


@pytest.mark.parametrize("name", sorted(set(NAMED.findall(MATHS))))
def test_every_function_named_in_the_maths_exists(name: str) -> None:
    parts = name.split(".")
    for place in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:place]))
        except ModuleNotFoundError:
            continue
        for part in parts[place:]:
            found = getattr(found, part)
        assert callable(found)
        return
    raise AssertionError(f"no module of {name} can be imported")


def test_every_formula_names_a_function() -> None:
    """Between a displayed formula and the next heading."""
    displayed = re.split(r"```math\n.*?```", MATHS, flags=re.DOTALL)[1:]
    assert len(displayed) > 10
    for after in displayed:
        assert NAMED.search(re.split(r"^#+ ", after, flags=re.MULTILINE)[0]), after[:80]


def test_formulas_are_ones_that_github_renders() -> None:
    for found in FORMULA.finditer(MATHS + (ROOT / "README.md").read_text()):
        text = found[1] or found[2]
        assert text.count("{") == text.count("}")
        assert len(re.findall(r"\\left\b", text)) == len(re.findall(r"\\right\b", text))
        assert len(re.findall(r"\\begin\b", text)) == len(re.findall(r"\\end\b", text))
        assert "\\operatorname" not in text  # refused by GitHub
    for row in re.findall(r"^\|.*$", MATHS, re.MULTILINE):
        assert all("|" not in formula for formula in re.findall(r"\$`(.*?)`\$", row)), row  # ends a cell


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "docs/maths.md", "docs/models.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text()):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_changelog_begins_with_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == version


# What pages show


@pytest.mark.thorough
@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_blocks_of_a_page_run_in_their_order(page: str, tmp_path: Path, forked: Forker) -> None:
    furnish(tmp_path)
    shared = ""
    for block in blocks(page):
        if block.why:
            continue
        if block.kind == "python" and "duckdb" in block.text:  # it uses the names of the block before it
            block = Block(block.page, block.line, block.kind, shared + block.text, "")
        shared = block.text if block.kind == "python" else shared
        run_block(block, tmp_path, forked)


def unrun() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.kind == "bash"]


@pytest.mark.parametrize("block", unrun(), ids=lambda block: f"{block.page}:{block.line}")
def test_commands_are_well_formed(block: Block) -> None:
    """Also of those that cannot run here: valid shell, known programs and configuration keys."""
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for words in block.commands:
        while "=" in words[0]:  # environment variables
            words = words[1:]
        assert words[0] in PROGRAMS
        place = next(
            (i for i, word in enumerate(words) if word == "dualkl" or word.startswith("stages.")), None
        )
        given = (
            [word[2:].partition("=")[0] for word in words[place:] if word.startswith("--")]
            if place is not None
            else []
        )
        is_cache = words[1:2] == ["cache"]
        assert is_cache or set(given) <= {*configuration.SECTION_OF, *OPTIONS}, words


@pytest.mark.parametrize("page", PAGES)
def test_yaml_blocks_are_configuration(page: str, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.kind == "yaml":
            (tmp_path / "some.yaml").write_text(block.text)
            configuration.parse_arguments(["--config", str(tmp_path / "some.yaml")], "")


# What the demo prints


def test_the_readme_shows_what_the_demo_printed() -> None:
    record = json.loads(demo_page.RECORD.read_text())
    assert demo_page.shown(demo_page.README.read_text()) == demo_page.printed(record["report"])


def test_the_picture_is_that_of_the_same_run() -> None:
    record = json.loads(demo_page.RECORD.read_text())
    assert f"{record['report']['after']['accuracy']:.0%}" in demo_page.PICTURE.read_text()
    assert demo_page.PICTURE.stat().st_size < 60_000
