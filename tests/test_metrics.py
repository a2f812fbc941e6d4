"""What a run logs: metrics.jsonl survives what a crash cuts off, a run on the site is one run."""

from pathlib import Path

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
    values = TINY | {"wandb_project": "p", "wandb_mode": "offline"}
    ids = []
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        run = make_run(folder, **values)
        assert run.metrics._wandb.id == (run.folder / "wandb_id").read_text()
        ids.append(run.metrics._wandb.id)
        run.metrics.close()
    assert ids[0] == ids[1] != ids[2]
