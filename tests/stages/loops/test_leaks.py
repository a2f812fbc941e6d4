"""Memory after refreshes: what is counted, and what is told when it grows."""

from pathlib import Path

import pytest
import torch

from stages.loops import leaks, refresh
from stages.runtime import host_memory
from tests.support.helpers import Forker, make_run, records_of, small
from tests.support.tiny_runs import TINY, save_weights, train

FEW_ROWS = TINY | {"refresh_every": 2, "checkpoint_every": 50}


def test_live_tensors_are_counted_once_each_on_a_cpu() -> None:
    before = leaks.allocated_bytes(torch.device("cpu"))
    whole = torch.zeros(1000, 1000)
    views = [whole[0], whole.t(), torch.nn.Parameter(whole)]
    assert leaks.allocated_bytes(torch.device("cpu")) - before == 4_000_000
    del whole, views
    assert leaks.allocated_bytes(torch.device("cpu")) == before


@pytest.mark.thorough
def test_six_refreshes_of_a_run_keep_memory_flat(tmp_path: Path, forked: Forker) -> None:
    """Units of 8 rows, scored in forwards of at most 100 tokens: several of different shapes a refresh."""
    values = FEW_ROWS | {"max_steps": 14, "teacher_ds_zero3": "true", "micro_batch_tokens": 100}
    forked.call(save_weights, tmp_path, small(tmp_path, **values), processes=2).expect_success()
    allocated = [record["memory_allocated_bytes"] for record in records_of(tmp_path / "demo", "refresh")]
    teacher_bytes = Path("examples/arithmetic/teacher/model.safetensors").stat().st_size
    assert len(allocated) == 6
    assert max(allocated) - allocated[0] <= 0.01 * teacher_bytes


def test_growth_over_refreshes_is_told_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, check = [], refresh.check_generator
    monkeypatch.setattr(leaks, "TOLERATED_BYTES", 2**20)
    monkeypatch.setattr(
        refresh, "check_generator", lambda *a: [kept.append(torch.zeros(2**20)), check(*a)][1]
    )
    run = train(tmp_path, **(FEW_ROWS | {"max_steps": 8}))
    growth = [record["memory_growth_bytes"] for record in records_of(run.folder, "refresh")]
    assert growth == pytest.approx([n * 4 * 2**20 for n in range(3)], abs=2**18)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    warnings = [line for line in warnings if "bytes are allocated" in line]
    assert len(warnings) == sum(bytes_ > 2**20 for bytes_ in growth)
    assert f"{growth[-1]:,} more than the" in warnings[-1]


def test_the_refresh_of_a_resumed_process_before_its_first_step_is_not_compared_with(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    for kind, values, comparable in [
        ("refresh", {"step": 0, "memory_allocated_bytes": 7}, False),
        ("step", {"step": 1}, False),
        ("refresh", {"step": 1, "memory_allocated_bytes": 5}, True),
        ("refresh", {"step": 1, "memory_allocated_bytes": 3}, True),
    ]:
        run.metrics.log(kind, **values)
        found = leaks.memory_after_refresh(run)
        assert found["memory_growth_bytes"] == (found["memory_allocated_bytes"] - 5 if comparable else 0)


def test_what_is_kept_only_while_there_is_room_is_no_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first refresh finds no room for the teacher and a checkpoint's copy, the later ones do."""
    monkeypatch.setattr(leaks, "TOLERATED_BYTES", 2**18)
    check, index = refresh.check_generator, [0]
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 2**40 * index[0])
    monkeypatch.setattr(
        refresh, "check_generator", lambda *a: [index.clear(), index.append(a[-1]), check(*a)][-1]
    )
    run = train(tmp_path, **(FEW_ROWS | {"max_steps": 8}))
    growth = [record["memory_growth_bytes"] for record in records_of(run.folder, "refresh")]
    assert growth == pytest.approx([0, 0, 0], abs=2**18)
    assert "bytes are allocated" not in capsys.readouterr().out
