"""Many refreshes in one process: memory, open files and threads stay what they were. `-m slow`: sixty of
them.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from stages import train as stage_two
from stages.loops import leaks, refresh
from stages.runtime.run import Run
from tests.support.helpers import Forker, small
from tests.support.thinning import leading
from tests.support.tiny_runs import TINY, save_weights

GROWN = 40 * 2**20  # bytes of resident memory that an allocator may keep


def soak(folder: Path, flags: list[str]) -> None:
    """In a process of its own: a run whose `folder`/soak.jsonl has what is held after each refresh."""
    refreshed = refresh.refresh

    def watched(run: Run, *rest: Any) -> None:
        refreshed(run, *rest)
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        held = {
            "tensors": leaks.allocated_bytes(run.world.device),
            "resident": int(fields["VmRSS"].split()[0]) * 1024,
            "threads": int(fields["Threads"]),
            "files": len(list(Path("/proc/self/fd").iterdir())),
        }
        with (folder / "soak.jsonl").open("a") as file:
            file.write(json.dumps(held) + "\n")

    assert stage_two.refresh is refresh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh, "refresh", watched)
        save_weights(folder, flags)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("refreshes", [*leading(0, [12]), pytest.param(60, marks=pytest.mark.slow)])
def test_a_run_of_many_refreshes_holds_no_more_than_after_the_second(
    tmp_path: Path, forked: Forker, refreshes: int
) -> None:
    values = TINY | {
        "max_steps": refreshes + 1,
        "refresh_every": 1,
        "checkpoint_every": 10,
        "teacher_ds_zero3": "true",
        "rollouts_per_refresh": 8,
        "rollouts_per_unit": 4,
    }
    forked.call(soak, tmp_path, small(tmp_path, **values)).expect_success()
    held = [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()]
    print(f"{refreshes} refreshes: {held[1]}, then {held[refreshes // 2]}, at last {held[-1]}")
    assert len(held) == refreshes
    for now in held[2:]:
        assert now["tensors"] <= held[1]["tensors"] * 1.01
        assert now["threads"] <= held[1]["threads"]
        assert now["files"] <= held[1]["files"]
        assert now["resident"] <= held[1]["resident"] + GROWN
