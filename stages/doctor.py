"""Check a configuration on this machine before it is run: a line a check, in seconds to a minute.

    python -m stages.doctor pipeline.yaml                 (torchrun for several processes; --KEY VALUE as elsewhere)

Checks files and prompts, ends, processes, disk, memory and Weights & Biases; then, on a few short rows in a
temporary folder: that a student that is its own teacher has loss 0, that the rollout engine computes what
training does, and that the teacher is the same sharded and plain. Exit code 1 if a check fails.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signal handling first: the imports below take seconds
    from stages.runtime import ending

    ending.install()

import io
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import torch

import cache
from cache.plain import plain
from stages.loops import checkup, machine
from stages.loops.checkup import Checkup
from stages.runtime.errors import OUT_OF_MEMORY, UserError, command, one_line
from stages.runtime.run import Run, open_run

SKIPPED = ("not needed", "not compared", "not loaded", "off:")
Check = Callable[[], str]


def main() -> None:
    run = open_run(__doc__ or "", with_config(sys.argv[1:]), only_looks=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dualkl-doctor-") as own:
        found = [check(run, name, work) for name, work in checks(Checkup(run, run.world.gather(own)[0]))]
        run.world.barrier()
    num_failed = found.count(False)
    verdict = f"{num_failed} of {len(found)} checks failed" if num_failed else "no check failed"
    say(run, f"{verdict}, in {time.perf_counter() - began:.0f} s")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if num_failed:
        raise SystemExit(1)


def with_config(arguments: list[str]) -> list[str]:
    """The command line with `--config` before a configuration file that is named alone."""
    if arguments and not arguments[0].startswith("-"):
        return ["--config", *arguments]
    return arguments


def checks(subject: Checkup) -> list[tuple[str, Check]]:
    """All checks in order: the cheap ones, then those that load models."""
    run = subject.run
    plan = machine.plan_of(run.config, run.world)
    return [
        ("ends", partial(checkup.check_ends, subject)),
        ("files", partial(checkup.check_files, subject)),
        ("processes", partial(machine.processes, run.world)),
        ("disk", partial(machine.disk, run.config, plan)),
        ("memory", partial(machine.memory, run.config, run.world, plan)),
        ("wandb", partial(machine.wandb, run.config)),
        ("student", partial(checkup.check_student, subject)),
        ("student = teacher", partial(checkup.check_loss, subject)),
        ("engine = forward", partial(checkup.check_engine, subject)),
        ("teacher", partial(checkup.check_teacher, subject)),
        ("sharded = plain", partial(checkup.check_sharded, subject)),
    ]


def check(run: Run, name: str, work: Check) -> bool:
    """Run a check and print its line; whether it passed on every process (collective)."""
    output = io.StringIO()
    problem = ""
    try:
        with redirect_stdout(output), redirect_stderr(io.StringIO()):
            told = work()
    except (UserError, cache.CacheError) as error:
        problem = str(error)
    except torch.OutOfMemoryError as error:
        problem = f"{OUT_OF_MEMORY} ({one_line(error)})"
    problem = next(filter(None, run.world.gather(problem)), "")
    if problem:
        say(run, f"FAIL  {name}: {problem}")
        return False
    state = "skip" if told.startswith(SKIPPED) else "pass"
    say(run, f"{state}  {name}: {told}")
    for line in filter(None, (line.strip() for line in output.getvalue().splitlines())):
        say(run, f"      {line}")
    return True


def say(run: Run, line: str) -> None:
    if run.world.is_main:
        print(plain(line), flush=True)


if __name__ == "__main__":
    command(main)
