"""The options that commands take beside the keys of the configuration, and a check of a whole command line.

Imports nothing heavy: a mistake is answered at once, before the imports of the command, which take seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cache.arguments import choice, positive, positive_number
from stages.runtime import config as configuration
from stages.runtime import flags
from stages.runtime.config import SECTION_OF, SWITCHES, Config
from stages.runtime.errors import UserError
from stages.runtime.run_folders import run_folder
from stages.runtime.terminal import take_style

EXAMPLE = "dualkl init --student MODEL --teacher MODEL --data FILE.jsonl"
OF_INIT = ("student", "teacher", "data", "out", "gpus", "gpu_memory")
OF_PLAN = ("gpus", "gpu", "gpu_memory", "mean_completion_tokens", "mean_prompt_tokens", "zero2")
NEEDED = {
    "run": ("student_model", "teacher_model", "dataset"),
    "plan": ("student_model", "teacher_model"),
}
"""Keys without a default that a command needs; other commands need the student."""
DTYPES = ("bf16", "fp16", "fp32")
"""Of exported weights."""


def check(command: str, arguments: Sequence[str]) -> None:
    """Raise UserError for mistakes in the command line of `dualkl COMMAND` that need no models and no data."""
    rest = take_style([*arguments])[1]
    if command == "view":
        of_view(rest)
    elif command == "export":
        run_folder(of_export(rest).run)
    elif command == "init":
        of_init(rest)
    elif command == "plan":
        of_plan(rest)
    elif command == "rollout" and "--follow" in rest:
        flags.split(split_follow(rest)[1], SECTION_OF, SWITCHES)
    elif command != "report":  # its first word may be a run's folder
        own = split_root(rest)[1] if command == "fidelity" else rest
        config = configuration.parse_arguments(own, "")
        configuration.require(config, *NEEDED.get(command, ("student_model",)))


def of_init(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str], Config]:
    """Options of init, the texts of the keys that are given, and their configuration."""
    parser = flags.Parser(prog="dualkl init", add_help=False)
    for name, key in (("student", "student_model"), ("teacher", "teacher_model"), ("data", "dataset")):
        parser.add_argument(f"--{name}", f"--{key}", default="")
    parser.add_argument("--out", default="")
    parser.add_argument("--gpus", type=positive, default=0)
    parser.add_argument("--gpu_memory", type=positive_number, default=0.0)
    own, rest = parser.parse_known_args(arguments)
    files, texts = flags.split(rest, SECTION_OF, SWITCHES, OF_INIT)
    if files:
        raise UserError(f"init writes a configuration and reads none, got {files[0]}; give single keys.")
    if missing := [f"--{name}" for name in ("student", "teacher", "data") if not getattr(own, name)]:
        raise UserError(f"init needs {' and '.join(missing)}: {EXAMPLE}")
    texts |= {"student_model": own.student, "teacher_model": own.teacher, "dataset": own.data}
    given = [f"--{leaf}={value}" for leaf, value in texts.items()]
    return own, texts, configuration.parse_arguments(given, "", OF_INIT)


def of_plan(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """Options of plan, and the configuration."""
    parser = flags.Parser(prog="dualkl plan", add_help=False)
    parser.add_argument("--gpus", type=positive)
    for name in ("gpu_memory", "mean_completion_tokens", "mean_prompt_tokens"):
        parser.add_argument(f"--{name}", type=positive_number)
    parser.add_argument("--gpu", default="")
    parser.add_argument("--zero2", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    config = configuration.parse_arguments(rest, "", OF_PLAN)
    configuration.require(config, *NEEDED["plan"])
    return own, config


def of_view(arguments: list[str]) -> argparse.Namespace:
    parser = flags.Parser(prog="dualkl view", add_help=False)
    parser.add_argument("places", nargs="+", metavar="RUN_OR_CACHE")
    parser.add_argument("--out", default="view.html")
    parser.add_argument("--rows", type=_count)
    parser.add_argument("--serve", nargs="?", type=int, const=0, metavar="PORT")
    parser.add_argument("--open", action="store_true")
    return parser.parse(arguments)


def of_export(arguments: list[str]) -> argparse.Namespace:
    parser = flags.Parser(prog="dualkl export", add_help=False)
    parser.add_argument("run", metavar="RUN")
    for flag in ("--merge", "--overwrite"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--dtype", type=choice(*DTYPES))
    for flag in ("--out", "--license", "--push"):
        parser.add_argument(flag, default="")
    return parser.parse(arguments)


def split_root(arguments: list[str]) -> tuple[str, list[str]]:
    """Split off a cache's folder, which is the first or the last argument of fidelity."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if len(arguments) % 2 and not arguments[-1].startswith("-"):
        return arguments[-1], arguments[:-1]
    return "", arguments


def split_follow(arguments: list[str]) -> tuple[str, list[str]]:
    """Split off the folder behind --follow."""
    place = arguments.index("--follow")
    folder, rest = arguments[place + 1 : place + 2], arguments[:place] + arguments[place + 2 :]
    if not folder or folder[0].startswith("--"):
        raise UserError("--follow needs the folder of the run to follow, e.g. --follow runs/demo.")
    return folder[0], rest


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rollouts; expected 1 or more")
    return int(text)
