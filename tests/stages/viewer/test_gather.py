"""What the page gets to show of runs and caches: complete, damaged, unfinished, large, hostile."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache
from stages import view
from stages.runtime import traces
from stages.viewer import figures, gather, page, rollouts, sample
from stages.viewer.rollouts import Rollout, payload, tops_of
from stages.viewer.tokens import Speller
from tests.support import cache_samples
from tests.support.helpers import ROOT, STUDENT
from tests.support.tiny_runs import train_from
from tests.support.viewing import data_of, ids_of, text_of, tokens_of, unpacked, values_of

TOKENIZER = (ROOT / STUDENT / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, caches: Callable[..., str]) -> Path:
    run = train_from(tmp_path_factory.mktemp("run"), caches(), max_steps=4, refresh_every=0, trace_every=2)
    return run.folder


def only(place: Path | str, rows: int | None = None) -> dict[str, Any]:
    """The page's data of one run or cache."""
    found: dict[str, Any] = gather.page_data([view.source(str(place))], rows)["runs"][0]
    return found | {"rollouts": unpacked(found["rollouts"])}


def test_rows_show_the_records_of_the_cache(trained: Path) -> None:
    found = only(trained)
    snapshot = cache.open(view.source(str(trained)).root)
    rollouts = found["rollouts"]
    assert rollouts["shown"] == rollouts["total"] == len(snapshot) == len(rollouts["rows"])
    assert rollouts["how"] == f"All {len(snapshot)} rollouts of the cache."
    entries = rollouts["vocabulary"]
    tops = ids_of(rollouts, "teacher_top")
    for row in rollouts["rows"]:
        record = snapshot[snapshot.position(row["id"])]
        own = slice(row["offset"], row["offset"] + row["tokens"])
        ids = [entries[place]["id"] for place in ids_of(rollouts, "token")[own]]
        assert ids == record.completion_ids.tolist()
        shown = values_of(rollouts, "teacher_logprob")[own]
        np.testing.assert_allclose(shown, record.teacher_logprobs, rtol=0.02, atol=0.01)
        assert [entries[place]["id"] for place in tops[own][:, 0]] == record.top1_id.tolist()
        gap = float((record.teacher_logprobs - record.behaviour_logprobs).mean())
        assert row["gap"] == pytest.approx(gap, abs=1e-5)


def test_traced_rows_show_what_training_computed(trained: Path) -> None:
    known = traces.newest_by_row(trained, pytest.fail)
    rollouts = only(trained)["rollouts"]
    rows = [row for row in rollouts["rows"] if row["traced_at"]]
    assert {row["id"] for row in rows} == {*known}
    entries = rollouts["vocabulary"]
    for row in rows:
        trace, own = known[row["id"]], slice(row["offset"], row["offset"] + row["tokens"])
        assert row["rkl"] == pytest.approx(trace.scalars["reverse_kl"].mean())
        assert row["traced_at"] == trace.step
        shown = values_of(rollouts, "lambda")[own]
        np.testing.assert_allclose(shown, trace.scalars["gate"], atol=0.003)
        tops = ids_of(rollouts, "student_top")[own][:, 0]
        assert [entries[place]["id"] for place in tops] == trace.top_ids[:, 0].tolist()


def test_a_bare_cache_has_rows_and_no_run(caches: Callable[..., str]) -> None:
    found = only(caches())
    assert (found["kind"], found["curves"], found["table"], found["notes"]) == ("cache", [], [], [])
    assert "rollouts with" in found["headline"]
    assert found["rollouts"]["rows"]
    assert {"teacher", "vocab_size"} <= {fact["label"] for fact in found["provenance"]}


def test_two_runs_come_in_order_with_their_keys(
    trained: Path, caches: Callable[..., str], tmp_path: Path
) -> None:
    other = train_from(tmp_path, caches(), max_steps=2, refresh_every=0, tau=0.5, run_name="other")
    runs = gather.page_data([view.source(str(folder)) for folder in (other.folder, trained)])["runs"]
    assert runs[0]["name"] == "other"
    assert runs[0]["config"]["loss"]["tau"] == 0.5 != runs[1]["config"]["loss"]["tau"]
    assert [run["steps"]["step"] for run in runs] == [[1, 2], [1, 2, 3, 4]]


def write_cache(
    root: Path, count: int, kind: str = "topk", tokenizer: str | None = None, **changes: Any
) -> Path:
    with cache.Writer(
        root,
        cache_samples.fingerprint(kind),
        tokenizer,
        head=cache_samples.head() if kind == "hidden" else None,
    ) as writer:
        for first in range(0, count, 50):
            for number in range(first, min(count, first + 50)):
                writer.append(cache_samples.record(number, kind, **changes))
            writer.commit(f"g0000-{first:05}")
    return root


def test_a_large_cache_is_sampled_over_kinds_and_refreshes(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", 400)
    rollouts = only(root, 40)["rollouts"]
    assert (rollouts["shown"], rollouts["total"], len(rollouts["rows"])) == (40, 400, 40)
    assert "360 are left out" in rollouts["how"]
    snapshot = cache.open(root)
    table = snapshot.to_table(["behaviour_logprobs", "teacher_logprobs"]).to_pylist()
    sums = [sum(row["behaviour_logprobs"]) - sum(row["teacher_logprobs"]) for row in table]
    worst = {snapshot.row_ids[i] for i in np.argsort(sums)[::-1][:8]}
    shown = {row["id"] for row in rollouts["rows"]}
    assert worst <= shown
    assert len({row["refresh"] for row in rollouts["rows"]}) > 20
    assert rollouts == only(root, 40)["rollouts"]  # the same rows every time


def test_any_beginning_of_a_sample_has_rows_of_each_kind(tmp_path: Path) -> None:
    found = sample.scan(cache.open(write_cache(tmp_path / "cache", 200)), pytest.fail)
    chosen, kinds = sample.choose(found, 50, range(100, 150))
    assert len({*chosen}) == 50
    assert "15 traced in training, 10 least likely to the teacher, 5 longest, 5 cut" in kinds
    assert 2 <= sum(100 <= row < 150 for row in chosen[:10]) <= 5


def test_a_page_that_would_be_too_large_has_fewer_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [view.source(str(write_cache(tmp_path / "cache", 200)))]
    root = sources[0].root
    whole = len(json.dumps(gather.page_data(sources)))
    monkeypatch.setattr(gather, "MOST_BYTES", whole // 2)
    found = only(root)
    assert whole // 3 < len(json.dumps(gather.page_data(sources))) < 6 * whole // 10
    assert 20 < found["rollouts"]["shown"] < 160
    assert f"{200 - found['rollouts']['shown']} are left out" in found["rollouts"]["how"]
    assert only(root, 200)["rollouts"]["shown"] == 200  # asked for


@pytest.mark.parametrize("kind", ["none", "nucleus", "hidden", "full"])
def test_every_signal_has_rows(tmp_path: Path, kind: str) -> None:
    root = write_cache(tmp_path / "cache", 12, kind)
    found = only(root)
    assert len(found["rollouts"]["rows"]) == 12
    assert ("teacher_top" in found["rollouts"]["columns"]) == (kind != "none")
    assert found["rollouts"]["rows"][0]["gap"] is None or kind != "none"
    page.render(gather.page_data([view.source(str(root))]))


def test_top_fives_that_would_take_too_long_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cache(tmp_path / "cache", 12, "hidden")
    snapshot = cache.open(root)
    monkeypatch.setattr(gather, "MOST_HEAD_WORK", 5 * max(gather.head_work(r, snapshot) for r in snapshot))
    found = only(root)
    (note,) = [note for note in found["notes"] if "top five" in note]
    (left_out,) = map(int, re.findall(r"for (\d+) of 12 rollouts", note))
    tops = ids_of(found["rollouts"], "teacher_top")[:, 0]
    rows = found["rollouts"]["rows"]
    known = [bool((tops[row["offset"] : row["offset"] + row["tokens"]] >= 0).all()) for row in rows]
    assert known.count(False) == left_out
    assert 0 < left_out < 8
    assert all(known[:5])


def test_a_damaged_shard_is_said_and_the_other_rows_are_shown(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", 100)
    shard = sorted((root / "shards").iterdir())[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    found = only(root)
    assert found["rollouts"]["shown"] == 50
    assert any(shard.name in note and "leaves its rows out" in note for note in found["notes"])
    assert "50 are left out" in found["rollouts"]["how"]


def test_a_run_whose_cache_is_gone_or_broken_has_its_figures(trained: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    config = (tmp_path / "config.yaml").read_text().splitlines()
    broken = ["cache_dir: ''" if line.strip().startswith("cache_dir:") else line for line in config]
    indent = next(line for line in config if "cache_dir:" in line).split("cache_dir")[0]
    text = "\n".join(indent + line if line.startswith("cache_dir") else line for line in broken)
    (tmp_path / "config.yaml").write_text(text)
    found = only(tmp_path)
    assert found["steps"]["step"] == [1, 2, 3, 4]
    assert found["rollouts"]["rows"] == []
    assert any("There is no cache" in note for note in found["notes"])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "fingerprint.json").write_text("{}")
    assert any("No rollouts are shown" in note for note in only(tmp_path)["notes"])


def test_a_run_that_stopped_before_its_first_step_has_a_page(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "lo')  # cut by a crash
    found = only(tmp_path)
    assert (found["verdict"], found["curves"], found["gate"]) == ("Not trained yet.", [], {})
    page.render(gather.page_data([view.source(str(tmp_path))]))


def test_what_models_write_cannot_leave_the_data(tmp_path: Path) -> None:
    text = "</script><script>alert(1)</script><!-- \u2028 \x1b[31m \u202e &amp;"
    root = write_cache(tmp_path / "cache", 3, prompt_text=text, prompt_id=text)
    html = page.render(gather.page_data([view.source(str(root))]))
    start = html.index('id="dualkl-data"')
    block = html[start : html.index("</script>", start)]
    assert not {"<", ">"} & {*block[block.index(">") + 1 :]}
    assert not {"<!--", "\u2028", "\x1b", "\u202e", "<script>"} & {part for part in block.split() if part}
    row = unpacked(data_of(html)["runs"][0]["rollouts"])
    assert row["rows"][0]["prompt_id"] == text
    assert row["prompts"][0]["text"] == text


def test_a_tokenizer_spells_and_without_one_ids_are_shown(tmp_path: Path) -> None:
    ids = {"completion_ids": np.array([24, 20, 1])}
    plain = [cache_samples.record(0, "none", 3, **ids)]
    for name, tokenizer in (("with", TOKENIZER), ("without", None)):
        with cache.Writer(tmp_path / name, cache_samples.fingerprint("none"), tokenizer) as writer:
            writer.append(plain[0])
            writer.commit("g0000-00000")
    spelled, numbers = only(tmp_path / "with"), only(tmp_path / "without")
    assert tokens_of(spelled["rollouts"], spelled["rollouts"]["rows"][0]) == ["4", "0", "<|end|>"]
    assert {"id": 1, "s": "<|end|>"} in spelled["rollouts"]["vocabulary"]
    assert tokens_of(numbers["rollouts"], numbers["rollouts"]["rows"][0]) == ["24 ", "20 ", "1 "]
    assert any("shown as their ids" in note for note in numbers["notes"])


def test_unlikely_ids_are_left_out_of_a_top_five_but_for_the_first() -> None:
    record = cache_samples.record(0, "topk", 2)
    logprobs = np.log([[0.9, 0.09, 0.009, 9e-4, 1e-9], [5e-4, 4e-4, 3e-4, 2e-4, 1e-4]])
    ids = np.arange(10).reshape(2, 5)
    found = unpacked(payload([Rollout(record, top=(ids, logprobs))], Speller(None)))
    entries = found["vocabulary"]
    tops = [[int(text_of(entries[p])) for p in row if p >= 0] for row in ids_of(found, "teacher_top")]
    assert tops == [[0, 1, 2], [5]]
    assert tops_of([cache_samples.record(0, "none", 2)], lambda: None) == [None]


@pytest.mark.parametrize(("place", "words"), [("nowhere", "neither a run"), ("", "neither a run")])
def test_a_place_that_is_neither_is_one_sentence(tmp_path: Path, place: str, words: str) -> None:
    with pytest.raises(view.UserError, match=words):
        view.source(str(tmp_path / place))


def test_the_command_writes_one_file_that_needs_nothing_from_elsewhere(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["dualkl view", str(trained), "--out", str(out), "--json"])
    view.main()
    facts = json.loads(capsys.readouterr().out)
    text = out.read_text()
    assert facts["page"] == str(out)
    assert facts["bytes"] == out.stat().st_size < 3_000_000
    assert "default-src &#x27;none&#x27;" in text
    assert "connect-src" not in text
    assert not re.search(r"(src|href)=[\"'](?!data:,|#)", text.split("<script>", 1)[0])
    assert data_of(text)["runs"][0]["name"] == trained.name


def test_figures_of_a_token_are_rounded_only_where_the_page_would_be_too_large(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = only(trained)["rollouts"]
    assert found["columns"]["rkl"]["bits"] == 16
    assert "rounded" not in found["how"]
    monkeypatch.setattr(gather, "MOST_BYTES", 2_000)
    found = only(trained, 4)["rollouts"]
    assert found["columns"]["rkl"]["bits"] == 10
    assert "Figures of a token are rounded" in found["how"]


def test_a_head_is_read_once_for_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = cache.Snapshot.head
    monkeypatch.setattr(cache.Snapshot, "head", lambda self: calls.append(self) or own(self))
    only(write_cache(tmp_path / "cache", 12, "hidden"))
    assert len(calls) == 1


def test_rows_that_go_through_the_head_together_have_their_own_top_fives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache.open(write_cache(tmp_path / "cache", 12, "hidden"))
    records = [*snapshot]
    alone = [tops_of([record], snapshot.head)[0] for record in records]
    monkeypatch.setattr(rollouts, "MOST_STATES", 3 * max(len(record.completion_ids) for record in records))
    for one, other in zip(alone, tops_of(records, snapshot.head), strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_allclose(one[1], other[1], rtol=1e-4, atol=1e-5)


def test_runs_are_compared_over_the_same_prompts() -> None:
    def measured(solved: list[float | None], tokens: int) -> dict[str, Any]:
        ids = ["a", "b", "c"]
        rows = {"prompt_ids": ids, "tokens": [tokens] * 3, "reverse_kl": [tokens * one for one in (1, 2, 3)]}
        return {"after": {"by_prompt": {"prompt_ids": ids, "solved": solved}, "on_student": {"by_row": rows}}}

    found = {one["label"]: one for one in figures.compared(measured([1, 1, 0], 9), measured([0, 0, 0], 5))}
    assert [*found] == ["Held-out problems solved", "Reverse KL on its own text"]
    solved = found["Held-out problems solved"]
    assert solved["value"] == pytest.approx(2 / 3)
    assert -0.4 < solved["low"] < 0.1
    assert solved["high"] > 0.9
    same = found["Reverse KL on its own text"]
    assert [same[name] for name in ("value", "low", "high")] == pytest.approx([0, 0, 0])
    assert len(figures.compared(measured([1, None, 0], 9), measured([0, 0, 0], 5))) == 1
    assert figures.compared({}, measured([0, 0, 0], 5)) == []


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = [str(write_cache(tmp_path / name / "cache", 2)) for name in ("a", "b")]
    named = [run["name"] for run in gather.page_data([view.source(place) for place in places])["runs"]]
    assert named == ["a/cache", "b/cache"]
    twins = [gather.Source("demo", place) for place in (*places, places[0])]
    named = [run["name"] for run in gather.page_data(twins)["runs"]]
    assert named == [places[0], places[1], f"{places[0]} (2)"]


def summary_of_gate(first: list[int], last: list[int]) -> dict[str, Any]:
    return {
        "first": {"steps": [1, 4], "gate_histogram": first},
        "last": {"steps": [13, 16], "gate_histogram": last},
    }


def test_a_sentence_says_what_the_gate_did() -> None:
    acted = figures.told_of_gate(summary_of_gate([1] * 10, [2, *[0] * 8, 8]), {"gating": "soft"})
    assert "In steps 13–16, 80.0% of the tokens had λ above 0.9" in acted
    assert "and 20.0% below 0.1" in acted
    assert "in steps 1–4, 10.0% and 10.0%" in acted
    assert "hardly" not in acted
    idle = figures.told_of_gate(summary_of_gate([*[0] * 9, 7], [*[0] * 9, 7]), {"gating": "hard"})
    assert idle.endswith("The gate hardly acted: a constant λ of 1 would train nearly the same.")
    assert figures.told_of_gate({}, {"gating": 0.5}) == "There is no gate: λ is 0.5 for every token."
    assert figures.told_of_gate({}, {"gating": 0.5, "objective": "jsd"}) == ""
    assert figures.told_of_gate(summary_of_gate([0] * 10, [0] * 10), {"gating": "soft"}) == ""


def test_a_threshold_that_stays_is_no_curve() -> None:
    records = [{"kind": "step", "step": step, "loss": 1.0, "tau": 0.1} for step in (1, 2)]
    assert "Gate threshold" not in [curve["title"] for curve in figures.steps(records)[0]]
    assert "Gate threshold" in [c["title"] for c in figures.steps([records[0], records[1] | {"tau": 0.2}])[0]]


@pytest.mark.parametrize(
    "name", [b"<script>alert(1)<", b"a\xe2\x80\xaeb\x1b[31m", b"bad\xff\xfe", b"-->\n'\""]
)
def test_any_name_of_a_folder_has_a_page(tmp_path: Path, name: bytes) -> None:
    root = write_cache(tmp_path / os.fsdecode(name), 4, tokenizer=TOKENIZER)
    data = gather.page_data([view.source(str(root))])
    text = page.render(data)
    (title,) = re.findall("<title>(.*?)</title>", text, re.DOTALL)
    assert not {*title} & {*"<>\x1b\u202e\n"}
    assert data_of(text)["runs"][0]["name"] == os.fsdecode(name)
    text.encode()


def test_a_damaged_tokenizer_leaves_ids(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache", 4, tokenizer=TOKENIZER)
    (root / "tokenizer.json").write_text("{")
    found = only(root)
    assert "Tokens are shown as their ids." in found["notes"][0]
    assert found["rollouts"]["shown"] == 4
    assert text_of(found["rollouts"]["vocabulary"][0]).strip().isdecimal()
