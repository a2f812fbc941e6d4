"""Check a configuration on this machine, in about a minute.

    dualkl doctor FILE

A line a check. First files and prompts, ends, processes, disk, memory and
Weights & Biases. Then, on a few short rows in a temporary folder: that a
student that is its own teacher has loss 0, that the rollout engine computes
what training does, and that the teacher is the same sharded and plain. Exit
code 1 if a check fails.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "doctor")

import io
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import torch

import cache
from stages.loops import checkup, machine
from stages.loops.checkup import Checkup, NotRun
from stages.runtime.errors import OUT_OF_MEMORY, UserError, command, one_line
from stages.runtime.run import open_run

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
    run = open_run(__doc__ or "", read_only=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dualkl-doctor-") as own:
        subject = Checkup(run, run.world.gather(own)[0])
        found = [check(subject, name) for name in CHECKS]
        run.world.barrier()
    states = [each["state"] for each in found]
    num_failed = states.count("FAIL")
    verdict = f"{num_failed} of {len(found)} checks failed" if num_failed else "no check failed"
    skipped = f", {states.count('skip')} were skipped" if "skip" in states else ""
    seconds = time.perf_counter() - began
    facts = {"failed": num_failed, "checks": found, "seconds": seconds}
    run.metrics.conclude(f"{verdict}{skipped}; {seconds:.0f} s", facts)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if num_failed:
        raise SystemExit(1)


def check(subject: Checkup, name: str) -> dict[str, str]:
    """Run a check and print its line (collective).

    Returns its name, its state (pass, FAIL on any process, or skip) and what it found.
    """
    run, output, problem, told = subject.run, io.StringIO(), "", ""
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
    state = "FAIL" if problem else "skip" if told.startswith(SKIPPED) else "pass"
    if run.world.is_main:
        run.metrics.style.say(f"{state}  {name}: {problem or told}", is_result=bool(problem))
    for line in [] if problem else filter(None, (line.strip() for line in output.getvalue().splitlines())):
        run.metrics.say(f"      {line}")
    return {"name": name, "state": state, "found": problem or told}


if __name__ == "__main__":
    command(main)
