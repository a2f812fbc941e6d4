"""recipes/slurm.sh, with two agents of torchrun on this machine in place of two machines.

`srun` and `scontrol` are stand-ins: the first starts its command twice and passes SIGTERM on, the second
names this machine twice and notes a request to queue the job again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.helpers import (
    ROOT,
    _free_port,
    assert_same_weights,
    environment,
    records_of,
    small,
    weights_in,
)

pytestmark = pytest.mark.slow
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
trap 'kill -TERM $first $second' TERM
"$@" & first=$!
"$@" & second=$!
code=0
for agent in $first $second; do
    while true; do
        wait $agent; found=$?
        kill -0 $agent 2>/dev/null || break  # else a signal interrupted the waiting
    done
    [ $found -gt $code ] && code=$found
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && printf '127.0.0.1\\n127.0.0.1\\n'
[ "$1" = requeue ] && echo "$2" >> requeued
exit 0
"""
KEYS = {
    "max_steps": 12,
    "refresh_every": 4,
    "rollouts_per_refresh": 32,
    "rollouts_per_unit": 8,
    "eval_prompts": 4,
}


def start(folder: Path, runs: Path) -> subprocess.Popen[str]:
    """The script as Slurm starts it: one task on each of two machines, a process each."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "RDZV_PORT": str(_free_port()),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        ["bash", str(ROOT / "recipes/slurm.sh"), *small(runs, **KEYS)],
        cwd=folder,
        env=environment(**job),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(job: subprocess.Popen[str], seconds: float = 400) -> str:
    try:
        return job.communicate(timeout=seconds)[0]
    finally:
        job.kill()


@pytest.mark.timeout(900)
def test_a_job_on_two_machines_is_preempted_queued_again_and_goes_on(tmp_path: Path) -> None:
    for name in ("examples", "pipeline.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    whole = start(tmp_path, tmp_path / "whole")
    out = finish(whole)
    assert whole.returncode == 0, out[-6000:]
    assert len(records_of(tmp_path / "whole" / "demo", "step")) == 12

    runs = tmp_path / "preempted"
    job = start(tmp_path, runs)
    log = runs / "demo" / "metrics.jsonl"
    wait_until(lambda: log.is_file() and '"kind": "step"' in log.read_text(), job)
    job.send_signal(signal.SIGTERM)
    out = finish(job)
    assert (tmp_path / "requeued").read_text() == "7\n", out[-6000:]
    done = len(records_of(runs / "demo", "step"))
    assert 1 <= done < 12
    assert (runs / "demo" / "checkpoints" / f"step-{done:06d}").is_dir(), out[-6000:]

    again = start(tmp_path, runs)
    out = finish(again)
    assert again.returncode == 0, out[-6000:]
    assert [record["step"] for record in records_of(runs / "demo", "step")] == list(range(1, 13))
    whole_student, student = (
        weights_in(folder / "demo" / "student") for folder in (tmp_path / "whole", runs)
    )
    assert_same_weights(whole_student, student)


def wait_until(holds: Callable[[], object], job: subprocess.Popen[str], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert job.poll() is None, finish(job)[-6000:]
        assert time.monotonic() < end
        time.sleep(0.05)
