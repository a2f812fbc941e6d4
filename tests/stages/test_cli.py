"""The command `dualkl`: its commands, how soon help is there, and what a wheel holds."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any, cast

import pytest

from cache import __main__ as cache_command
from stages import cli
from stages.runtime import options as own_options
from tests.support.helpers import ROOT, Forker, run_python, small

HEAVY = ("torch", "transformers", "datasets", "deepspeed", "peft")


def dualkl(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stages.cli", *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [[], ["train", "--help"], ["run", "--help", "all"], ["init", "--help"], ["export", "--help"]],
    ids=str,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['dualkl', *{arguments}]\n"
        "from stages import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = run_python("-c", code).expect_success()
    assert done.out.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", sorted({*cli.COMMANDS} - {"cache", "view"}))
def test_the_help_of_a_command_is_one_screen_by_either_name(name: str) -> None:
    """The whole docstring and the keys that matter, on 40 lines of 80 columns."""
    shown = dualkl(name, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith(cli.docstring(cli.COMMANDS[name]).strip())
    assert f"    dualkl {name} " in shown.stdout
    assert "--json" in shown.stdout
    lines = shown.stdout.splitlines()
    assert len(lines) <= 40
    assert [line for line in lines if len(line) > 80] == []
    assert "…" not in shown.stdout
    if name == "train":
        assert run_python("-m", cli.COMMANDS[name], "--help").out == shown.stdout
        assert dualkl("help", name).stdout == shown.stdout


def test_the_overview_lists_the_commands_with_what_they_do() -> None:
    shown = cli.overview()
    for name, module in cli.available().items():
        line = f"  {name:<10}{cli.docstring(module).partition(chr(10))[0]}"
        assert f"{line}\n" in shown
        assert len(line) <= 80
    assert len(shown.splitlines()) <= 40
    assert {"run", "rollout", "train", "evaluate", "report", "plan", "cache"} <= cli.available().keys()


def test_help_that_nobody_reads_ends_silently() -> None:
    code = f"{sys.executable} -m stages.cli run --help all | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout in ("141\n", "0\n")


def test_an_unknown_command_names_the_nearest() -> None:
    done = dualkl("trane")
    assert (done.returncode, done.stderr) == (2, "error: unknown command trane; did you mean train?\n")


def test_the_version_is_that_of_the_tree_without_an_installed_package(tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert dualkl("--version").stdout == f"dualkl {version}\n"
    code = (
        "from importlib import metadata\n"
        "def absent(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = absent\n"
        "from stages.runtime import history\n"
        "from stages.viewer import gather\n"
        "print(history.versions()['dualkl'], gather.page_data([gather.Source('x', 'nowhere')])['made']['version'])"
    )
    done = run_python("-c", code).expect_success()
    assert done.out == f"{version} {version}\n"


def completed(*words: str) -> list[str]:
    """What the completion script proposes for the last of `words`."""
    typed = " ".join(f"'{word}'" for word in words)
    script = f"""{cli.completion()}
COMP_WORDS=(dualkl {typed}); COMP_CWORD={len(words)}; _dualkl; echo "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_completion_knows_commands_and_keys() -> None:
    assert completed("tra") == ["train"]
    assert completed("train", "--lora_a") == ["--lora_alpha"]
    assert completed("plan", "qwen3-8") == ["qwen3-8b"]
    assert completed("export", "--lora_a") == []
    assert completed("nothing", "--lora_a") == []


def test_the_completion_knows_the_options_of_each_command() -> None:
    own: dict[str, set[str]] = {
        "init": {f"--{name}" for name in own_options.OF_INIT},
        "plan": {f"--{name}" for name in own_options.OF_PLAN},
        "view": {"--out", "--rows", "--serve", "--open"},
        "export": {"--merge", "--dtype", "--out", "--overwrite", "--license", "--push"},
        "rollout": {"--follow"},
    }
    for name, options in own.items():
        assert options | {"--help", "--quiet", "--json"} <= {*completed(name, "--")}, name


def test_the_completion_knows_what_the_cache_takes() -> None:
    commands = cast(Any, cache_command._parser()._subparsers)._group_actions[0].choices
    assert set(commands) <= {*completed("cache", "")}
    options = {option for parser in commands.values() for option in parser._option_string_actions}
    assert options - {"-h"} == {*completed("cache", "summary", "--")}


def test_the_cache_command_is_that_of_the_package(tmp_path: Path) -> None:
    done = dualkl("cache", "summary", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_mistake_is_one_sentence_and_exit_code_2() -> None:
    done = dualkl("report", "--learning_rate", "1")
    assert done.returncode == 2
    assert done.stderr == "error: unknown key learning_rate on the command line; did you mean lr?\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["run", "demo", "--max_step", "1"],
            "unknown key max_step on the command line; did you mean max_steps?",
        ),
        (["train", "demo", "--lr"], "--lr needs a value"),
        (["doctor", "demo", "--lr", "low"], "config key train.lr: input should be a valid number, got 'low'"),
        (["rollout"], "student_model is missing"),
        (["rollout", "--follow"], "--follow needs the folder of the run"),
        (["evaluate", "nothing.yaml"], "config file nothing.yaml does not exist"),
        (
            ["plan", "demo", "--gpu_memry", "80"],
            "unknown key gpu_memry on the command line; did you mean gpu_memory?",
        ),
        (["fidelity", "runs/x/cache", "--lrr", "1"], "unknown key lrr on the command line; did you mean lr?"),
        (["init", "--student", "x"], "init needs --teacher and --data"),
        (["export", "runs/x", "--mrge"], "unknown option --mrge of dualkl export; did you mean --merge?"),
        (["export", "nothing"], "there is no run at nothing"),
        (["view", "x", "--row", "3"], "unknown option --row of dualkl view; did you mean --rows?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_in_the_command_line_is_answered_before_anything_heavy_is_imported(
    arguments: list[str], sentence: str
) -> None:
    code = (
        f"import sys; sys.argv = ['dualkl', *{arguments}]\n"
        "from stages import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert end.code == 2\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = run_python("-c", code).expect_success()
    assert done.out == "[]\n"
    assert done.err.startswith(f"error: {sentence}")
    assert done.err.count("\n") == 1


def test_a_command_without_models_says_which_key_is_missing(forked: Forker) -> None:
    forked.stage("stages.train").expect_sentence("student_model is missing", "--student_model")
    forked.stage("stages.rollout", "--student_model", "x").expect_sentence("teacher_model is missing")
    forked.stage("stages.plan", "--gpu", "h100", "--student_model", "x").expect_sentence(
        "teacher_model is missing"
    )


@pytest.mark.thorough
def test_a_run_without_evaluation_ends_with_the_student_and_the_next_command(
    tmp_path: Path, forked: Forker
) -> None:
    folder = tmp_path / "demo"
    arguments = small(tmp_path, eval_prompts=0, max_steps=2)
    done = forked.stage("stages.pipeline", *arguments).expect_success()
    assert f"student {folder / 'student'}" in done.out
    assert f"next    dualkl export {folder}" in done.out
    assert "held-out prompts" not in done.out
    assert not (folder / "eval").exists()
    lines = [line for line in done.err.splitlines() if line.startswith("training: ")]
    assert lines[-1].startswith("training: 2 of 2 steps; loss ")
    for figure in ("reverse KL ", "forward KL ", "λ ", "tokens/s"):
        assert figure in lines[-1]
    assert done.err.splitlines() == lines, "libraries are silent"
    assert not set("\r\x1b") & set(done.out + done.err)
    quiet = forked.stage("stages.report", str(folder), "--quiet").expect_success()
    assert f"student {folder / 'student'}" in quiet.out
    forked.stage("stages.evaluate", *arguments).expect_sentence("eval_prompts is 0")


def test_a_wheel_holds_the_demo_and_the_recipes(tmp_path: Path) -> None:
    """Built from the files that the package needs, by the build backend itself."""
    pytest.importorskip("setuptools", "70", reason="setuptools builds the wheel")
    source = tmp_path / "source"
    names = ["stages", "dualkl", "cache", "recipes", "examples"]
    for name in names:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pipeline.yaml"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=300)
    wheel = next(tmp_path.glob("*.whl"))
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert (installed / "stages/shipped/pipeline.yaml").read_bytes() == (ROOT / "pipeline.yaml").read_bytes()
    entry = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "dualkl = stages.cli:main" in entry
    code = (
        "from stages.runtime.config import parse_arguments as p; print(p(['demo'], '').models.student_model)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = Path(done.stdout.strip())
    assert found.is_relative_to(installed)
    assert (found / "model.safetensors").is_file()


def test_commands_handle_signals_before_their_imports() -> None:
    """Each command handles signals and --help first, since its imports take seconds."""
    for name in cli.available().keys() - {"cache", "view"}:
        tree = ast.parse((ROOT / f"{cli.COMMANDS[name].replace('.', '/')}.py").read_text())
        first = next(i for i, node in enumerate(tree.body) if "begin(__doc__" in ast.unparse(node))
        before = [ast.unparse(node) for node in tree.body[:first]]
        assert not [
            text for text in before if text.startswith(("import ", "from ")) and "__future__" not in text
        ]
