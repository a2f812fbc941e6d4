"""What a run logs: metrics.jsonl survives what a crash cuts off, a run on the site is one run."""

import sys
from pathlib import Path
from typing import Any

import pytest

from stages.runtime.errors import UserError
from stages.runtime.metrics import read as read_metrics
from tests.helpers import make_run
from tests.tiny_runs import TINY


def test_a_metrics_line_cut_off_by_a_crash_does_not_swallow_the_next(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    run.metrics.log("step", step=1, loss=0.5)
    with run.metrics.path.open("a") as file:
        file.write('{"kind": "step", "st')
    make_run(tmp_path, **TINY).metrics.log("evaluation", step=2)
    assert [record["kind"] for record in read_metrics(run.metrics.path)] == ["step", "evaluation"]


def test_all_starts_of_a_run_are_one_run_on_the_site_and_other_folders_another(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    values = TINY | {"wandb_project": "p", "wandb_mode": "offline"}
    ids = []
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        run = make_run(folder, **values)
        assert run.metrics._wandb.id == (run.folder / "wandb_id").read_text()
        ids.append(run.metrics._wandb.id)
        run.metrics.close()
    assert ids[0] == ids[1] != ids[2]


def test_a_project_on_the_site_without_its_package_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb cannot be imported here .*or leave wandb_project empty"):
        make_run(tmp_path, **(TINY | {"wandb_project": "p"}))


def test_the_site_gets_the_numbers_of_nested_tables_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    sent: list[tuple[dict[str, float], int]] = []

    class Site:
        def log(self, values: dict[str, float], step: int) -> None:
            sent.append((values, step))

    site: Any = Site()
    run.metrics._wandb = site
    table = {"0-3": {"tokens": 7, "rkl": 0.5}, "other runs": {"tokens": 2, "rkl": None}}
    run.metrics.log("gate", step=4, tau=0.25, by_age=table, gate_histogram=[1, 2], reason="none")
    numbers = {"tau": 0.25, "by_age/0-3/tokens": 7, "by_age/0-3/rkl": 0.5, "by_age/other runs/tokens": 2}
    assert sent == [({"gate/step": 4, **{f"gate/{name}": value for name, value in numbers.items()}}, 4)]
