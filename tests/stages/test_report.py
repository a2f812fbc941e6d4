"""The report: fixed keys, figures, honest verdicts, and a page that stands alone."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import cache
from stages import report
from stages.runtime import traces
from stages.runtime.config import Config, to_yaml
from stages.runtime.metrics import PHASES
from tests.support import cache_samples
from tests.support.helpers import ROOT, STUDENT, make_config
from tests.support.viewing import data_of

STEP = {
    "kind": "step",
    "loss": 0.2,
    "rkl": 0.5,
    "fkl": 0.2,
    "gate": 0.9,
    "share_forward": 0.12,
    "grad_norm": 0.3,
    "tokens": 100,
    "seconds": 0.5,
}
CACHE = {"rows": 8, "scored_tokens": 80, "bytes_per_token": 9.0, "signal_bytes_per_token": 6.0}
CLOCK = {
    "kind": "clock",
    "load": 1.0,
    "rollout": 2.0,
    "score": 3.0,
    "train": 4.0,
    "evaluate": 5.0,
    "total": 20.0,
}


POLICY = "0123456789abcdef"
EXPORT = {"kind": "export", "step": 2, "policy_hash": POLICY}


def evaluation(accuracy: float | None, kl: float) -> dict[str, Any]:
    sample = {"prompt": "How many?", "completion": "<script>alert(1)</script>", "solved": True}
    texts = {"forward_kl": kl, "reverse_kl": 2 * kl, "top1_agreement": 0.5, "tokens": 10, "cut_share": 0.5}
    of = {"policy_hash": POLICY}
    return {
        **texts,
        "accuracy": accuracy,
        "cut_share": 0.03,
        "on_student": texts,
        "samples": [sample],
        "of": of,
    }


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path, max_steps=2)


@pytest.fixture
def folder(config: Config) -> Path:
    """A finished run with known figures, resumed once, whose cache is not there."""
    (config.run_folder / "eval").mkdir(parents=True)
    for label, found in (
        ("before", evaluation(0.3, 0.2)),
        ("after", evaluation(0.8, 0.05)),
        ("teacher", {"accuracy": 0.95, "cut_share": 0.02, "samples": []}),
    ):
        (config.run_folder / "eval" / f"{label}.json").write_text(json.dumps(found))
    records = [
        CLOCK | {"start": 1, "total": 10.0},
        CLOCK | {"start": 1},
        STEP | {"step": 1},
        {"kind": "refresh", "step": 1, "refresh_index": 1},
        STEP | {"step": 2, "gate": 0.95},
        EXPORT,
        CLOCK | {"start": 2},
    ]
    (config.run_folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return config.run_folder


def test_the_figures_are_those_of_the_files(folder: Path, config: Config) -> None:
    found = report.write_report(folder, config)
    assert json.loads((folder / "report.json").read_text()) == found
    assert found["before"] == {
        "forward_kl": 0.2,
        "reverse_kl": 0.4,
        "top1_agreement": 0.5,
        "accuracy": 0.3,
        "cut_share": 0.03,
        "on_student": {"forward_kl": 0.2, "reverse_kl": 0.4, "top1_agreement": 0.5, "cut_share": 0.5},
    }
    assert found["after"]["accuracy"] == 0.8
    assert found["teacher"] == {"accuracy": 0.95, "cut_share": 0.02}
    assert found["ratios"]["on_student"] == {"forward_kl": 0.25, "reverse_kl": 0.25}
    assert found["run"]["refreshes"] == 1
    assert found["run"]["first_step_share_forward"] == 0.12
    assert found["cache"] == dict.fromkeys(
        ("rows", "scored_tokens", "bytes_per_token", "signal_bytes_per_token", "cut_share")
    )


def test_the_run_and_its_configuration_are_in_the_report(folder: Path, config: Config) -> None:
    found = report.collect(folder, config)
    assert found["run"] == {
        "configurations": [],
        "warnings": [],
        "name": "demo",
        "steps": 2,
        "max_steps": 2,
        "measured_step": 2,
        "measured_apart": {},
        "answers_changed": None,
        "unclear": {"on_student": [], "teacher_text": []},
        "refreshes": 1,
        "trained_tokens": 200,
        "trained_tokens_per_second": 200.0,
        "refresh_reasons": [],
        "first_step_share_forward": 0.12,
        "first_step_gate": 0.9,
        "last_step_gate": 0.95,
        "last_step_reverse_kl": 0.5,
        "last_step_forward_kl": 0.2,
    }
    assert found["config"]["loss"]["tau"] == config.loss.tau


def test_the_cache_figures_are_the_caches_own(folder: Path, config: Config) -> None:
    cache_samples.write(Path(config.cache_root), range(3))
    own = cache.open(config.cache_root).summary()
    found = report.collect(folder, config)["cache"]
    assert found["rows"] == 3
    assert found["scored_tokens"] == 1 + 2 + 3
    assert found.pop("cut_share") == own["finish_reasons"]["length"] / 3
    assert found == {name: own[name] for name in found}


def test_the_verdict_says_how_much_was_cut(folder: Path, config: Config) -> None:
    found = report.collect(folder, config)
    assert "cut" not in found["verdict"]
    answers = changed(found, "after", cut_share=0.25)
    assert report.verdict(answers).endswith(". 25 % of held-out answers were cut at max_new_tokens.")
    both = changed(answers, "cache", cut_share=0.61)
    assert "61 % of completions were cut at max_new_tokens; 25 % of held-out answers" in report.verdict(both)
    assert report.verdict(both).endswith("of beginnings: raise max_new_tokens and train again.")
    lines = report.summary(both | {"cache": both["cache"] | CACHE}, folder, config).splitlines()
    assert any(
        line.split()[-3:] == ["3.0%", "25.0%", "2.0%"] and "cut at max_new_tokens" in line for line in lines
    )
    assert any(
        line.startswith("cache ") and line.endswith("61 % of completions were cut at max_new_tokens")
        for line in lines
    )


def test_the_clocks_of_a_resumed_run_add_up(folder: Path, config: Config) -> None:
    seconds = report.collect(folder, config)["seconds"]
    known = {"load": 2, "rollout": 4, "score": 6, "train": 8, "evaluate": 10, "total": 40}
    assert seconds == dict.fromkeys(PHASES, 0) | known  # clocks of older versions name fewer phases


def changed(found: dict[str, Any], label: str, **values: Any) -> dict[str, Any]:
    other = copy.deepcopy(found)
    other[label] |= values
    other["ratios"] = report._ratios(other["before"], other["after"])
    return other


def test_the_verdict_says_what_the_numbers_say(folder: Path, config: Config) -> None:
    found = report.collect(folder, config)
    assert "improved by 50.0 points, from 30.0% to 80.0%" in found["verdict"]
    assert "forward KL fell to 0.25 ×" in found["verdict"]
    assert "got worse by 20.0 points" in report.verdict(changed(found, "after", accuracy=0.1))
    assert "did not improve" in report.verdict(changed(found, "after", accuracy=0.305))
    worse = {"forward_kl": 0.4, "reverse_kl": 0.9, "top1_agreement": 0.4}
    assert "forward KL rose to 2.00 ×" in report.verdict(changed(found, "after", on_student=worse))
    mixed = {"forward_kl": 0.1, "reverse_kl": 0.6, "top1_agreement": 0.4}
    assert "forward KL went to 0.50 × and reverse KL to 1.50 ×" in report.verdict(
        changed(found, "after", on_student=mixed)
    )
    same = {"forward_kl": 0.1999, "reverse_kl": 0.3999, "top1_agreement": 0.5}
    assert "forward KL went to 1.00 ×" in report.verdict(changed(found, "after", on_student=same))


def test_the_headline_says_whether_the_answers_changed_by_more_than_chance(
    folder: Path, config: Config
) -> None:
    found = report.collect(folder, config)
    assert report.headline(found) == "Solves 80.0% of held-out problems, 30.0% before training"
    for gained, lost, words in (
        (5, 0, "within chance"),
        (6, 0, "up from 30.0%"),
        (3, 3, "as many as before"),
    ):
        run = found["run"] | {"answers_changed": {"gained": gained, "lost": lost}}
        assert words in report.headline(found | {"run": run})
    unchecked = changed(changed(found, "before", accuracy=None), "after", accuracy=None)
    assert report.headline(unchecked) == (
        "Nearer to the teacher: reverse KL 0.4000 → 0.1000 nats a token on its own text"
    )
    assert report.headline(found | {"run": found["run"] | {"max_steps": 9}}) == "Unfinished: 2 of 9 steps"


def test_the_verdict_claims_no_change_that_chance_or_error_explains(folder: Path, config: Config) -> None:
    found = report.collect(folder, config)
    run = found["run"] | {
        "answers_changed": {"gained": 5, "lost": 2},
        "unclear": {"on_student": ["reverse KL"]},
    }
    told = report.verdict(found | {"run": run})
    assert told.startswith(
        "No clear change of the answers: from 30.0% to 80.0% of held-out problems (5 gained, 2 "
    )
    assert "chance explains, and more eval_prompts would tell; on its own text forward KL fell" in told
    assert "(the change of reverse KL is within the error over so few held-out prompts)" in told
    sure = found["run"] | {"answers_changed": {"gained": 6, "lost": 0}}
    assert "improved by 50.0 points" in report.verdict(found | {"run": sure})


def test_a_divergence_is_unclear_within_its_error_over_prompts() -> None:
    def measured(own: float, by_row: list[float]) -> dict[str, Any]:
        rows = {"tokens": [10, 10, 10, 10], "reverse_kl": by_row}
        return {"on_student": {"reverse_kl": own, "reverse_kl_error": 0.1}, "by_row": rows}

    before = measured(0.5, [4.0, 5.0, 6.0, 7.0])
    near, far = measured(0.4, [5.0, 4.0, 6.5, 6.5]), measured(0.1, [3.9, 4.9, 5.9, 6.8])
    assert report._unclear({"before": before, "after": near}) == {
        "on_student": ["reverse KL"],
        "teacher_text": ["reverse KL"],
    }
    assert report._unclear({"before": before, "after": far}) == {"on_student": [], "teacher_text": []}


def test_answers_that_changed_are_counted_by_prompt(folder: Path, config: Config) -> None:
    for label, solved in (("before", [True, False, False, 0.5]), ("after", [False, True, True, 0.75])):
        path = folder / "eval" / f"{label}.json"
        told = json.loads(path.read_text())
        told["by_prompt"] = {"prompt_ids": ["a", "b", "c", "d"], "solved": solved, "cut": [False] * 4}
        path.write_text(json.dumps(told))
    assert report.collect(folder, config)["run"]["answers_changed"] == {"gained": 3, "lost": 1}


def test_the_verdict_compares_only_what_was_measured_twice(folder: Path, config: Config) -> None:
    found = report.collect(folder, config)
    unchecked = changed(changed(found, "after", accuracy=None), "before", accuracy=None)
    assert report.verdict(unchecked).endswith("of what they were; no answers were checked.")
    assert report.verdict(unchecked).startswith("On its own text forward KL fell")
    (folder / "eval" / "before.json").unlink()
    found = report.write_report(folder, config)
    assert found["verdict"].startswith(
        "80.0% of held-out problems solved after training, nothing to compare it with"
    )
    assert "divergences were not measured both before and after" in found["verdict"]
    without_teacher = changed(report.collect(folder, config), "before", forward_kl=0.1, reverse_kl=0.2)
    assert "on teacher text forward KL fell to 0.50 ×" in report.verdict(without_teacher)


def test_a_run_that_was_not_measured_at_its_end_says_so(folder: Path, config: Config) -> None:
    (folder / "eval" / "after.json").unlink()
    found = report.write_report(folder, config)
    assert found["verdict"].startswith("Finished: 2 of 2 steps, and nothing measured")
    assert found["after"]["accuracy"] is None
    assert "–" in report.summary(found, folder, config)


def test_a_measurement_in_the_middle_is_not_called_the_end(folder: Path, tmp_path: Path) -> None:
    found = report.collect(folder, make_config(tmp_path, max_steps=4))
    assert found["verdict"].startswith(
        "Unfinished, 2 of 4 steps; as last measured at step 2: the student improved by 50.0"
    )


@pytest.mark.parametrize(
    "records",
    [
        [EXPORT | {"step": 4, "policy_hash": "f" * 16}],
        [{"kind": "evaluation", "label": "after", "step": 4, "policy_hash": "f" * 16}],
    ],
    ids=["exported", "measured"],
)
def test_figures_of_a_student_that_is_not_the_runs_newest_are_not_its_own(
    folder: Path, config: Config, records: list[dict[str, Any]]
) -> None:
    noted(folder, *records)
    found = report.write_report(folder, config)
    assert found["after"] == dict.fromkeys(("accuracy", *report.MEASURES, "cut_share")) | {
        "on_student": dict.fromkeys((*report.MEASURES, "cut_share"))
    }
    assert found["run"]["measured_step"] is None
    assert found["verdict"].endswith("and nothing measured after them.")
    assert page_of(folder)["table"][0]["after"] is None


def test_figures_of_a_student_that_was_measured_and_not_exported_count(folder: Path, config: Config) -> None:
    lines = (folder / "metrics.jsonl").read_text().replace('"export"', '"evaluation", "label": "after"')
    (folder / "metrics.jsonl").write_text(lines)
    assert report.collect(folder, config)["after"]["accuracy"] == 0.8


def test_figures_without_a_record_of_their_student_do_not_count(folder: Path, config: Config) -> None:
    """As after going back: the records of later steps are gone, eval/after.json is not."""
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "export" not in line]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert report.collect(folder, config)["after"]["accuracy"] is None


def test_a_report_of_files_that_a_power_cut_emptied_says_so(
    folder: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("before", "after", "teacher"):
        (folder / "eval" / f"{label}.json").write_text("")
    (folder / "trace").mkdir()
    cache.Writer(
        folder / "cache", cache_samples.fingerprint(), (ROOT / STUDENT / "tokenizer.json").read_text()
    )
    (folder / "trace" / "step-000001.arrow").write_text("")
    (folder / "trace" / "step-x.arrow").write_text("")
    (folder / "config.yaml").mkdir()
    found = report.write_report(folder, report.own_config(folder, config))
    assert found["before"]["accuracy"] is None
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" cannot be read (")[0][-11:] for line in said] == [
        "before.json",
        "/after.json",
        "eacher.json",
        "00001.arrow",
    ]


@pytest.mark.parametrize(
    ("column", "value"),
    [("token_ids", [-5, 6]), ("gate", [0.5]), ("row_id", 7), ("reverse_kl", ["<b>", ""]), ("gate", ...)],
    ids=str,
)
def test_a_trace_of_wrong_columns_is_left_out(
    folder: Path, config: Config, capsys: pytest.CaptureFixture[str], column: str, value: Any
) -> None:
    write_trace(folder, {} if value is ... else {column: [value]}, without=column if value is ... else "")
    report.write_report(folder, config)
    assert "step-000010.arrow cannot be read" in capsys.readouterr().out
    assert any("step-000010.arrow" in note for note in page_of(folder)["notes"])


def test_a_trace_whose_offsets_lie_is_left_out(
    folder: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_trace(folder, {})
    data = path.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 10))  # of top_ids
    assert offsets in data
    path.write_bytes(data.replace(offsets, b"".join(n.to_bytes(4, "little") for n in (2**29, 2**30))))
    report.write_report(folder, config)
    assert "step-000010.arrow cannot be read" in capsys.readouterr().out


def test_numbers_at_the_edge_of_what_numbers_can_be_have_a_report(folder: Path, config: Config) -> None:
    for label, kl in (("before", 1e-300), ("after", 1e40)):
        (folder / "eval" / f"{label}.json").write_text(json.dumps(evaluation(0.5, kl)))
    noted(folder, STEP | {"step": 3, "loss": 1e39, "rkl": float("-inf")})
    assert report.write_report(folder, config)["ratios"]["teacher_text"]["forward_kl"] is None


def test_what_is_not_a_number_is_null(folder: Path, config: Config) -> None:
    broken = json.dumps({**evaluation(0.8, 0.05), "forward_kl": float("nan"), "on_student": None})
    (folder / "eval" / "after.json").write_text(broken)
    step = STEP | {"step": 3, "gate": float("nan"), "loss": float("inf")}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step) + "\n")
    found = report.write_report(folder, config)
    assert json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail) == found
    assert found["after"]["forward_kl"] is None
    assert found["after"]["on_student"] == dict.fromkeys((*report.MEASURES, "cut_share"))
    assert found["run"]["last_step_gate"] is None
    assert "at the end –" in report.summary(found, folder, config)


def test_an_infinite_setting_is_spelled_out(folder: Path, tmp_path: Path) -> None:
    found = report.write_report(folder, make_config(tmp_path, importance_cap=".inf"))
    assert found["config"]["loss"]["importance_cap"] == "Infinity"


def test_a_run_of_one_step_has_a_page(folder: Path, config: Config) -> None:
    (folder / "metrics.jsonl").write_text(json.dumps(STEP | {"step": 1}) + "\n")
    assert report.write_report(folder, config)["run"]["steps"] == 1
    page = page_of(folder)
    assert page["steps"]["loss"] == [0.2]
    assert page["seconds"] == []


def test_a_run_that_has_done_nothing_has_a_report_too(config: Config) -> None:
    config.run_folder.mkdir(parents=True)
    found = report.write_report(config.run_folder, config)
    assert found["verdict"] == "Not trained yet."
    assert "none noted" in report.summary(found, config.run_folder, config)


def test_the_page_stands_alone_and_escapes_what_models_write(folder: Path, config: Config) -> None:
    report.write_report(folder, config)
    html = (folder / "report.html").read_text()
    assert "<script>alert(1)" not in html
    assert "\\u003cscript\\u003ealert(1)" in html
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html.split("<script>", 1)[0])
    assert "improved by 50.0 points" in page_of(folder)["verdict"]
    assert page_of(folder)["answers"][0]["after"]["text"] == "<script>alert(1)</script>"


def page_of(folder: Path) -> dict[str, Any]:
    """What report.html shows of its run."""
    (run,) = data_of((folder / "report.html").read_text())["runs"]
    found: dict[str, Any] = run
    return found


def write_trace(folder: Path, changed: dict[str, Any], without: str = "") -> Path:
    """A trace of one row of two tokens, and a cache with the tokenizer that spells them."""
    (folder / "trace").mkdir()
    cache.Writer(
        folder / "cache", cache_samples.fingerprint(), (ROOT / STUDENT / "tokenizer.json").read_text()
    )
    columns: dict[str, Any] = {"row_id": ["a" * 32], "step": [10], "token_ids": [[5, 6]]}
    columns |= {name: [[0.25, 0.875]] for name in (*traces.SCALARS, "student_log_tail_mass")}
    columns |= {"top_ids": [[*range(10)]], "top_logprobs": [[-1.0] * 10]}
    columns = {name: column for name, column in columns.items() if name != without} | changed
    try:
        trace = pa.table(columns, schema=traces.SCHEMA)
    except (pa.ArrowException, KeyError, TypeError):  # columns that a trace does not have
        trace = pa.table(columns)
    path = folder / "trace" / "step-000010.arrow"
    with pa.ipc.new_file(str(path), trace.schema) as writer:
        writer.write_table(trace)
    return path


def test_the_command_reports_the_configuration_of_the_run(
    folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(
        "sys.argv", ["report", "--config", str(ROOT / "pipeline.yaml"), "--runs_dir", str(folder.parent)]
    )
    report.main()
    assert "improved by 50.0 points" in capsys.readouterr().out
    assert json.loads((folder / "report.json").read_text())["config"]["train"]["max_steps"] == 2
    assert page_of(folder)["config"]["train"]["max_steps"] == 2


def test_a_moved_run_is_read_where_it_lies(folder: Path, config: Config, tmp_path: Path) -> None:
    (folder / "config.yaml").write_text(to_yaml(config))
    moved = folder.rename(tmp_path / "elsewhere")
    own = report.own_config(moved, make_config(tmp_path, run_name="elsewhere", max_steps=9))
    assert own.run_folder == moved
    assert own.cache_root == str(moved / "cache")
    assert own.train.max_steps == 2


def test_a_missing_run_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["report", "--runs_dir", str(tmp_path)])
    with pytest.raises(report.UserError, match=r"there is no run at .*`dualkl run` with"):
        report.main()


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        ({"gating": 0.25}, "mix     constant: λ, the weight of the reverse KL, is 0.25 for every token"),
        ({"gating": 0.5, "objective": "jsd"}, "loss    Jensen-Shannon divergence with β 0.5"),
    ],
)
def test_a_loss_without_a_gate_is_named_as_what_it_is(
    folder: Path, config: Config, loss: dict[str, Any], line: str
) -> None:
    ungated = config.model_copy(update={"loss": config.loss.model_copy(update=loss)})
    text = report.summary(report.collect(folder, config), folder, ungated)
    assert line in text.splitlines()
    assert "gate    " not in text


def test_a_summary_without_evaluations_shows_the_last_step(folder: Path, config: Config) -> None:
    for label in ("before", "after"):
        (folder / "eval" / f"{label}.json").unlink()
    text = report.summary(report.collect(folder, config), folder, config)
    assert "train   reverse KL 0.5000 and forward KL 0.2000 nats a token at the last step" in text
    assert "held-out problems solved" not in text


def test_a_run_is_located_by_its_folder(
    folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr("sys.argv", ["report", str(folder), "--json"])
    report.main()
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "report.json").read_text())


def test_the_summary_shows_before_after_and_teacher(folder: Path, config: Config) -> None:
    text = report.summary(report.collect(folder, config), folder, config)
    assert re.search(r"held-out problems solved\s+30.0%\s+80.0%\s+95.0%", text)
    assert "12.0% of tokens had λ < 0.5" in text
    assert "time    40 s: load 2 s (5%)" in text


def test_the_page_shows_drift_held_out_divergence_and_why_rows_were_refreshed(
    folder: Path, config: Config
) -> None:
    drift = {"drift": 0.02, "ess": 0.97, "ess_rows": 0.6}
    reason = "drift: 0.03 nats a token, the bound is 0.02"
    records = [
        STEP | drift | {"step": 1},
        {"kind": "refresh", "step": 1, "refresh_index": 1, "reason": reason},
        STEP | drift | {"step": 2, "drift": -0.001},
        {"kind": "eval", "step": 2, "reverse_kl": 0.3, "forward_kl": 0.1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert report.write_report(folder, config)["run"]["refresh_reasons"] == [{"step": 1, "reason": reason}]
    page = page_of(folder)
    assert page["steps"]["drift"] == [0.02, -0.001]
    assert page["steps"]["heldout_reverse_kl"] == [None, 0.3]
    assert page["marks"][0] == {"step": 1, "kind": "refresh", "text": f"refresh 1: {reason}"}
    titles = [curve["title"] for curve in page["curves"]]
    assert {"Drift from the policy of the rows", "Effective sample size"} <= {*titles}


# Stage one


def progress(began: float, units: int, **values: Any) -> dict[str, Any]:
    """After `units` units of 10 rollouts: 2 s of generation, 1 s of scoring, 0.5 s for the writer and 0.5 s
    of the rest each.
    """
    return {
        "kind": "rollout_progress",
        "began": began,
        "evaluation": False,
        "rollouts": 10 * units,
        "seconds": 4.0 * units,
        "generated_tokens": 400 * units,
        "scored_tokens": 600 * units,
        "padded_tokens": 800 * units,
        "share_generate": 0.5,
        "share_score": 0.25,
        "share_write": 0.125,
        "share_rows": 0.0,
        "peak_memory_bytes": units * 2**30,
        **values,
    }


def noted(folder: Path, *records: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_rounds_add_up_without_those_of_evaluations(folder: Path, config: Config) -> None:
    noted(
        folder,
        progress(0.5, 1, evaluation=True),
        progress(1.5, 1),
        progress(1.5, 2),
        progress(2.5, 1),
        {"kind": "rollout_progress", "rollouts": 7},  # an older run's
    )
    found = report.collect(folder, config)["stage_one"]
    assert found == {
        "rounds": 3,
        "rollouts": 30,
        "seconds": 12.0,
        "shares": {"generate": 0.5, "score": 0.25, "write": 0.125, "rows": 0.0, "other": 0.125},
        "generated_tokens_per_second": 200.0,
        "scored_tokens_per_second": 400.0,
        "padding_waste": 0.25,
        "peak_memory_bytes": 2 * 2**30,
    }


def test_a_scorer_alone_has_no_rate_of_generation(folder: Path, config: Config) -> None:
    alone = {"generated_tokens": 0, "share_generate": 0.0, "share_rows": 0.5, "peak_memory_bytes": 0}
    noted(folder, progress(1.5, 1, **alone), progress(1.5, 2, **alone))
    found = report.write_report(folder, config)["stage_one"]
    assert found["generated_tokens_per_second"] is None
    assert found["peak_memory_bytes"] is None
    assert found["shares"]["rows"] == 0.5
    page = page_of(folder)
    assert page["stage_one"]["shares"]["rows"] == 0.5
    assert page["rounds"]["peak_memory_bytes"] == [0, 0]


def test_the_page_shows_where_the_time_of_stage_one_went(folder: Path, config: Config) -> None:
    before = report.write_report(folder, config)["stage_one"]
    assert before["rounds"] == 0
    assert page_of(folder)["rounds"]["seconds"] == []
    noted(folder, progress(1.5, 1), progress(1.5, 2), progress(2.5, 1))
    report.write_report(folder, config)
    page = page_of(folder)
    assert page["stage_one"]["rollouts"] == 30
    assert page["rounds"] == {
        "seconds": [{"generate": 2.0, "score": 1.0, "write": 0.5, "rows": 0.0, "other": 0.5}] * 3,
        "generated_tokens_per_second": [200.0] * 3,
        "scored_tokens_per_second": [400.0] * 3,
        "peak_memory_bytes": [2**30, 2 * 2**30, 2**30],
        "is_first": [True, False, True],
    }


def test_figures_of_different_settings_are_not_compared_without_a_word() -> None:
    old = {"of": {"max_new_tokens": 24, "seed": 0, "policy_hash": "a"}}
    new = {"of": {"max_new_tokens": 128, "seed": 0, "policy_hash": "b"}}
    apart = report._measured_apart({"before": old, "after": new, "teacher": {}})
    assert apart == {"max_new_tokens": [24, 128]}
    assert "max_new_tokens 24 and 128" in report._apart_clause({"measured_apart": apart})
    assert report._apart_clause({"measured_apart": {}}) == ""
