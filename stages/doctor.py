"""Check a configuration on this machine before it is run: a line a check, in seconds to a minute.

    python -m stages.doctor pipeline.yaml           (torchrun for several processes; --KEY VALUE as elsewhere)

Checks files and prompts, ends, processes, disk, memory and Weights & Biases; then, on a few short rows in a
temporary folder: that a student that is its own teacher has loss 0, that the rollout engine computes what
training does, and that the teacher is the same sharded and plain. Exit code 1 if a check fails.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__)

import io
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import torch

import cache
from cache.plain import plain
from stages.loops import checkup, machine
from stages.loops.checkup import Checkup, NotRun
from stages.runtime.errors import OUT_OF_MEMORY, UserError, command, one_line
from stages.runtime.run import Run, open_run

SKIPPED = ("not run", "not needed", "not compared", "not loaded", "off:")
CHECKS: dict[str, Callable[[Checkup], str]] = {
    "models": checkup.check_models,
    "ends": checkup.check_ends,
    "files": checkup.check_files,
    "processes": lambda subject: machine.processes(subject.run.world),
    "disk": checkup.check_disk,
    "memory": checkup.check_memory,
    "wandb": lambda subject: machine.wandb(subject.config),
    "student": checkup.check_student,
    "student = teacher": checkup.check_loss,
    "engine = forward": checkup.check_engine,
    "teacher": checkup.check_teacher,
    "sharded = plain": checkup.check_sharded,
    "quantised = plain": checkup.check_quantized,
}
"""In order: the cheap ones, then those that load models."""


def main() -> None:
    # report an unreachable hub once, not once per retry
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    run = open_run(__doc__ or "", with_config(sys.argv[1:]), read_only=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dualkl-doctor-") as own:
        subject = Checkup(run, run.world.gather(own)[0])
        found = [check(subject, name) for name in CHECKS]
        run.world.barrier()
    num_failed = found.count("FAIL")
    verdict = f"{num_failed} of {len(found)} checks failed" if num_failed else "no check failed"
    skipped = f", {found.count('skip')} were skipped" if "skip" in found else ""
    say(run, f"{verdict}{skipped}; {time.perf_counter() - began:.0f} s")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if num_failed:
        raise SystemExit(1)


def with_config(arguments: list[str]) -> list[str]:
    """The command line with `--config` before a configuration file that is named alone."""
    if arguments and not arguments[0].startswith("-"):
        return ["--config", *arguments]
    return arguments


def check(subject: Checkup, name: str) -> str:
    """Run a check and print its line; returns pass, FAIL (on any process) or skip (collective)."""
    run, output, problem = subject.run, io.StringIO(), ""
    try:
        with redirect_stdout(output), redirect_stderr(io.StringIO()):
            told = CHECKS[name](subject)
    except (UserError, cache.CacheError) as error:
        problem = str(error)
    except NotRun as error:
        told = f"not run: {error}"
    except torch.OutOfMemoryError as error:
        problem = f"{OUT_OF_MEMORY} ({one_line(error)})"
    problem = next(filter(None, run.world.gather(problem)), "")
    if problem:
        say(run, f"FAIL  {name}: {problem}")
        return "FAIL"
    state = "skip" if told.startswith(SKIPPED) else "pass"
    say(run, f"{state}  {name}: {told}")
    for line in filter(None, (line.strip() for line in output.getvalue().splitlines())):
        say(run, f"      {line}")
    return state


def say(run: Run, line: str) -> None:
    if run.world.is_main:
        print(plain(line), flush=True)


if __name__ == "__main__":
    command(main)
