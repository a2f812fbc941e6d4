"""The command `dualkl`: each of its commands is a module, which `python -m` runs too.

Imports nothing heavy: help appears at once, and signals are handled from the start.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path

from stages.runtime import ending

COMMANDS = {
    "init": "stages.init",
    "run": "stages.pipeline",
    "rollout": "stages.rollout",
    "train": "stages.train",
    "evaluate": "stages.evaluate",
    "report": "stages.report",
    "view": "stages.view",
    "plan": "stages.plan",
    "fidelity": "stages.fidelity",
    "cache": "cache.__main__",
    "export": "stages.export",
    "doctor": "stages.doctor",
}
EVERYTHING = ("run", "models", "lora", "data", "rollout", "loss", "train", "refresh", "eval")
CONFIGURED: dict[str, tuple[str, ...]] = {
    "init": ("run", "lora", "data", "rollout", "loss", "train", "eval"),
    "run": EVERYTHING,
    "rollout": ("run", "models", "data", "rollout", "teacher_signal", "refresh"),
    "train": ("run", "models", "lora", "loss", "train", "refresh"),
    "evaluate": ("run", "models", "data", "rollout", "eval"),
    "report": ("run",),
    "plan": ("models", "lora", "rollout", "teacher_signal", "train"),
    "fidelity": ("run", "models", "loss"),
    "doctor": ("run", "models", "lora", "data", "rollout", "train"),
}
"""Commands that take any key of the configuration, and the sections of which their short help shows keys."""
COMPLETION = """_dualkl() {{
  local keys="{keys}"
  local words="{commands}"
  if [ "$COMP_CWORD" -gt 1 ]; then
    case "${{COMP_WORDS[1]}}" in
{cases}
      *) words="" ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _dualkl dualkl"""


def main() -> None:
    """Run `dualkl COMMAND ...`, as `python -m MODULE ...` would."""
    name, rest = sys.argv[1:2], sys.argv[2:]
    if name == ["help"] and rest:
        name, rest = rest[:1], ["--help", *rest[1:]]
    if not name or name[0] in ("-h", "--help", "help"):
        _show(overview())
    elif name[0] == "--version":
        from stages.runtime.version import own_version

        print(f"dualkl {own_version()}")
    elif name[0] == "--completion":
        _show(completion())
    elif name[0] not in available():
        near = difflib.get_close_matches(name[0], available(), 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(available())}."
        print(f"error: unknown command {name[0]}{hint}", file=sys.stderr)
        raise SystemExit(2)
    elif name[0] == "cache":
        from cache import __main__, interrupt

        interrupt.install()
        raise SystemExit(__main__.main(rest))
    else:
        _run(name[0], rest)


def _run(name: str, rest: list[str]) -> None:
    sys.argv = [f"dualkl {name}", *rest]
    begin(docstring(COMMANDS[name]), name)
    module = importlib.import_module(COMMANDS[name])
    from stages.runtime.errors import command

    command(module.main)


def begin(description: str | None, name: str) -> None:
    """Handle signals, `--help` of the command `name` (its docstring, and its keys), and mistyped arguments.

    Call it before imports, which take seconds.
    """
    ending.install()
    arguments = sys.argv[1:]
    if not {"--help", "-h"} & {*arguments}:
        from stages.runtime import errors, options

        errors.command(lambda: options.check(name, arguments))
        return
    from stages.runtime.config import SECTIONS
    from stages.runtime.help import help_text

    text = description or ""
    groups = CONFIGURED.get(name)
    _show(
        text.strip()
        if groups is None
        else help_text(text, SECTIONS, "all" in arguments, groups, name == "init")
    )
    raise SystemExit(0)


def _show(text: str) -> None:
    """Print `text`; exit silently if nobody reads it (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def available() -> dict[str, str]:
    return {name: module for name, module in COMMANDS.items() if importlib.util.find_spec(module)}


def docstring(module: str) -> str:
    """The docstring of a module that is not imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def overview() -> str:
    """The commands with the first sentence of each, and where to begin."""
    from stages.runtime.shipped import ROOT

    lines = [f"  {name:<10}{docstring(module).partition(chr(10))[0]}" for name, module in available().items()]
    return "\n".join(
        [
            "usage: dualkl COMMAND [FILE ...] [--KEY VALUE ...]",
            "",
            *lines,
            "",
            "dualkl run demo             distil a small real student on the CPU, in minutes",
            "dualkl COMMAND --help       the most used keys; --help all shows every key",
            "dualkl --version            the version",
            "source <(dualkl --completion)    complete commands, options and keys in bash",
            "                                 (in zsh after bashcompinit)",
            "",
            "dualkl plan qwen3-4b takes a recipe by its name; recipes are in",
            f"{ROOT / 'recipes'}",
        ]
    )


def completion() -> str:
    """A completion script for bash: commands, then the options and names that each takes."""
    from stages.runtime.config import SECTION_OF

    keys = " ".join(f"--{key}" for key in ("config", *SECTION_OF))
    cases = "\n".join(f'      {name}) words="{" ".join(_words(name))}" ;;' for name in available())
    return COMPLETION.format(commands=" ".join(available()), keys=keys, cases=cases)


def _words(name: str) -> list[str]:
    """What may follow a command: options and subcommands in its docstring, keys, configurations by name."""
    from stages.runtime.shipped import configurations

    lines = docstring(COMMANDS[name]).splitlines()
    own = "\n".join(line for line in lines if line.strip().startswith("--") or f"dualkl {name} " in line)
    subcommands = re.findall(rf"(?<=dualkl {name} )[a-z]+(?= ROOT)", own)
    words = ["--help", *subcommands, *re.findall(r"--[a-z_0-9]+", own)]
    if name != "cache":
        words += ["--quiet", "--json"]
    if name in CONFIGURED:
        words += ["$keys", *configurations()] if name != "init" else ["$keys"]
    return list(dict.fromkeys(words))


if __name__ == "__main__":
    main()
