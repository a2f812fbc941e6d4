"""Code blocks of Markdown pages: found, run with small models, or checked where they cannot run here."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.helpers import ROOT, STUDENT, TEACHER, Forker, flags

BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE
)
TINY: dict[str, Any] = {
    "device": "cpu",
    "dtype": "fp32",
    "teacher_dtype": "fp32",
    "max_steps": 2,
    "refresh_every": 8,
    "rollouts_per_refresh": 8,
    "rollouts_per_unit": 8,
    "batch_size": 4,
    "grad_accum": 1,
    "num_prompts": 16,
    "eval_prompts": 4,
    "max_new_tokens": 16,
    "group_size": 1,
}
CONFIGURED = ("init", "run", "rollout", "train", "evaluate")
"""Commands that take all keys; the tiny sizes are added to them."""


@dataclass(frozen=True)
class Block:
    """A fenced block; `why`: why it is not run here, "" if it is. `line`: where its text begins."""

    page: str
    line: int
    kind: str
    text: str
    why: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "&"]
            if words:
                found.append(words)
        return found


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")) + 1,
            found["kind"],
            found["text"],
            found["why"] or "",
        )
        for found in BLOCK.finditer(text)
    ]


def furnish(folder: Path) -> None:
    """Put what the pages' commands read into `folder`: models under the names of Qwen3's, and a data file."""
    (folder / "Qwen").mkdir()
    (folder / "Qwen" / "Qwen3-4B").symlink_to(ROOT / STUDENT)
    (folder / "Qwen" / "Qwen3-32B").symlink_to(ROOT / TEACHER)
    lines = (ROOT / "examples/arithmetic/train.jsonl").read_text().splitlines()[:200]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def run_block(block: Block, folder: Path, forked: Forker) -> None:
    """Run a block as a reader would, in `folder`, with the tiny sizes."""
    if block.kind == "python" and (found := re.match(r"# (\w+\.py)\n", block.text)):
        (folder / found[1]).write_text(block.text)
    elif block.kind == "python":
        forked.call(_execute, folder, block.text).expect_success()
    elif block.kind == "bash":
        for words in block.commands:
            assert words[0] == "dualkl", f"{block.page}:{block.line}: no way to run {words[0]} here"
            forked.call(_command, folder, tiny(words[1:])).expect_success()


def tiny(words: list[str]) -> list[str]:
    """A command's words with the tiny sizes added, and its own numbers of steps made small."""
    is_whole = "--follow" in words or words[0] not in CONFIGURED
    own = {word for word in words if word.startswith("--")}
    words = ["4" if before == "--max_steps" else word for before, word in zip(["", *words], words)]
    return words if is_whole else words + flags(**{k: v for k, v in TINY.items() if f"--{k}" not in own})


def _command(folder: Path, words: list[str]) -> None:
    import os

    os.chdir(folder)
    sys.argv = ["dualkl", *words]
    from stages import cli

    cli.main()


def _execute(folder: Path, text: str) -> None:
    import functools
    import os

    from stages import api

    os.chdir(folder)
    sizes = {key: value for key, value in TINY.items() if f"{key}=" not in text}
    api.distill = functools.partial(api.distill, **sizes)
    exec(compile(text, "block", "exec"), {"__name__": "__main__"})
