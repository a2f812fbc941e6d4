"""What a Writer takes, what it refuses and in which words, and what a commit makes exist."""

import errno
import os
import re

import numpy as np
import pytest

import cache
from tests.support.cache_samples import (
    KEPT,
    KINDS,
    VOCAB,
    assert_same,
    files,
    fingerprint,
    head,
    record,
    row_id,
    write,
)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_as_they_were_appended(tmp_path, kind):
    result = write(tmp_path, range(9), kind)
    snapshot = cache.open(tmp_path)
    assert len(snapshot) == result.rows == 9
    for number in range(9):
        assert_same(snapshot[snapshot.position(row_id(number))], record(number, kind))
    assert snapshot.verify() == []


def test_rows_exist_only_once_they_are_committed(tmp_path):
    with cache.Writer(tmp_path, fingerprint()) as writer:
        writer.append(record(0))
        assert len(cache.open(tmp_path)) == 0
        assert writer.committed_ids == set()
        writer.commit("g0")
        assert writer.committed_ids == {row_id(0)}
        assert cache.open(tmp_path).row_ids == [row_id(0)]


def test_an_exception_drops_uncommitted_rows_and_leaves_no_file(tmp_path):
    def fail():
        with cache.Writer(tmp_path, fingerprint()) as writer:
            writer.append(record(0))
            raise KeyError("elsewhere")

    with pytest.raises(KeyError, match="elsewhere"):
        fail()
    assert files(tmp_path / "shards") == []
    assert len(cache.open(tmp_path)) == 0


def test_leaving_with_uncommitted_rows_is_the_callers_mistake(tmp_path):
    writer = cache.Writer(tmp_path, fingerprint())
    writer.append(record(0))
    with pytest.raises(AssertionError, match=r"1 appended rows were not committed; call commit\(unit\)"):
        writer.__exit__(None, None, None)
    assert files(tmp_path / "shards") == []


def test_committed_rows_are_left_out_of_a_later_unit(tmp_path):
    write(tmp_path, range(4), unit="g0")
    with cache.Writer(tmp_path, fingerprint()) as writer:
        assert writer.committed_ids == {row_id(n) for n in range(4)}
        for number in range(2, 6):
            writer.append(record(number))
        result = writer.commit("g1")
        assert (result.rows, result.rows_left_out) == (2, 2)
        writer.append(record(5))
        again = writer.commit("g2")
        assert (again.rows, again.rows_left_out, again.num_bytes) == (0, 1, 0)
    snapshot = cache.open(tmp_path)
    assert sorted(snapshot.row_ids) == sorted(row_id(n) for n in range(6))
    assert snapshot.summary()["duplicate_rows"] == 0
    assert len(files(tmp_path / "shards")) == 2


def test_one_units_rows_may_change_with_the_plan(tmp_path):
    write(tmp_path, range(2), unit="g0")
    write(tmp_path, range(4), unit="g0")
    assert len(cache.open(tmp_path)) == 4


def test_a_row_twice_in_a_unit_and_an_empty_unit_are_refused(tmp_path):
    with cache.Writer(tmp_path, fingerprint()) as writer:
        with pytest.raises(cache.CacheError, match="unit g0 has no rows; append at least one"):
            writer.commit("g0")
        writer.append(record(0))
        with pytest.raises(cache.CacheError, match=f"row {row_id(0)} was appended twice"):
            writer.append(record(0))
        with pytest.raises(cache.CacheError, match=r"unit name '\.\./x' cannot be a file name"):
            writer.commit("../x")
        writer.commit("any name/with: signs")
    assert cache.open(tmp_path).index["unit"].to_pylist() == ["any name/with: signs"]


def broken(name, position, value, kind="topk"):
    """Row 5 (six tokens) with one number replaced, in a plain column or as `signal.x`."""
    row = record(5, kind)
    owner = row.signal if name.startswith("signal.") else row
    array = getattr(owner, name.removeprefix("signal.")).copy()
    array[position] = value
    object.__setattr__(owner, name.removeprefix("signal."), array)
    return row


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            lambda: broken("teacher_logprobs", 3, np.nan),
            r"teacher_logprobs[3] is nan; expected a logprob, nats: finite",
        ),
        (
            lambda: broken("behaviour_logprobs", 0, -np.inf),
            "behaviour_logprobs[0] is -inf; expected a logprob",
        ),
        (lambda: broken("behaviour_logprobs", 0, 0.5), "behaviour_logprobs[0] is 0.5; expected a logprob"),
        (lambda: broken("teacher_entropy", 5, np.inf), "teacher_entropy[5] is inf; expected an entropy"),
        (lambda: broken("behaviour_entropy", 1, -1), "behaviour_entropy[1] is -1.0; expected an entropy"),
        (lambda: broken("log_tail_mass", 2, np.nan), "log_tail_mass[2] is nan; expected the ln of a mass"),
        (lambda: broken("top1_logprob", 2, np.nan), "top1_logprob[2] is nan; expected a logprob"),
        (lambda: broken("top1_id", 2, VOCAB), "top1_id[2] is 503; expected an id from 0 to 502"),
        (
            lambda: broken("completion_ids", 0, VOCAB),
            "completion_ids[0] is 503; expected an id from 0 to 502",
        ),
        (lambda: broken("prompt_ids", 0, -1), "prompt_ids[0] is -1; expected an id from 0 to 502"),
        (
            lambda: broken("signal.ids", (2, 1), VOCAB),
            "signal.ids[2, 1] is 503; expected an id from 0 to 502",
        ),
        (
            lambda: broken("signal.logprobs", (2, 1), np.nan),
            "signal.logprobs[2, 1] is nan; expected a finite logprob",
        ),
        (
            lambda: broken("signal.logprobs", (4, 3), 0.0),
            "signal.logprobs[4, 3] is 0.0; expected falling logprobs",
        ),
        (lambda: broken("signal.logprobs", (4, 4), -40), "the mass of signal's kept ids and tail[4] is 0.9"),
        (lambda: broken("signal.log_tail_mass", 0, np.nan), "signal.log_tail_mass[0] is nan"),
        (lambda: broken("signal.ids", (1, 1), -1), "signal.logprobs[1, 1] is -"),
        (lambda: broken("signal.ids", (1, 1), record(5).signal.ids[1, 0]), "signal.ids[1] keeps id"),
        (
            lambda: broken("top1_id", 2, (record(5).signal.ids[2, 0] + 1) % VOCAB),
            "expected the id in the signal's slot 0",
        ),
        (lambda: record(5, prompt_ids=[]), "prompt_ids is empty; expected at least one token"),
        (lambda: record(5, completion_ids=[]), "completion_ids is empty; expected at least one token"),
        (
            lambda: record(5, teacher_entropy=[0.1]),
            "teacher_entropy has 1 entries; expected 6, one a completion token",
        ),
        (lambda: record(5, teacher_entropy=None), "teacher_entropy is missing, but the signal kind is topk"),
        (lambda: record(5, signal=None), "signal is none; expected topk, as the fingerprint says"),
        (lambda: record(5, signal=record(1).signal), f"signal has ids [2, {KEPT}]"),
        (lambda: record(5, finish_reason="stop"), "finish_reason is 'stop'; expected one of eos, length"),
        (lambda: record(5, policy_step=-1), "policy_step is -1; expected a count"),
        (lambda: record(5, run_id=""), "run_id is empty; expected a name"),
    ],
)
def test_a_row_that_breaks_an_invariant_is_refused_by_name(tmp_path, row, sentence):
    with cache.Writer(tmp_path, fingerprint()) as writer:
        with pytest.raises(cache.CacheError) as caught:
            writer.append(row())
        assert str(caught.value).startswith(f"row {row_id(5)}: ")
        assert sentence in str(caught.value)
        assert str(caught.value).endswith("The row was not written. This is a bug in the caller.")
        writer.append(record(0))
        assert writer.commit("g0").rows == 1


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (
            "hidden",
            {"position": (3, 2), "value": 0x7FC0},
            "signal.states[3, 2] is nan; expected a finite number",
        ),
        (
            "hidden",
            {"position": (3, 2), "value": 0xFF80},
            "signal.states[3, 2] is -inf; expected a finite number",
        ),
        (
            "full",
            {"position": (0, 1), "value": np.inf},
            "signal.logits[0, 1] is inf; expected a finite number",
        ),
    ],
)
def test_states_and_logits_must_be_finite(tmp_path, kind, changes, sentence):
    name = "signal.states" if kind == "hidden" else "signal.logits"
    with (
        cache.Writer(tmp_path, fingerprint(kind)) as writer,
        pytest.raises(cache.CacheError, match=re.escape(sentence)),
    ):
        writer.append(broken(name, changes["position"], changes["value"], kind))


def test_row_ids_k_and_temperature_follow_the_format_and_the_fingerprint(tmp_path):
    narrow = {"kind": "topk", "k": KEPT - 1, "temperature": 1.0}
    warm = {"kind": "topk", "k": KEPT, "temperature": 2.0}
    for name, signal, row, sentence in (
        ("a", narrow, record(1), "signal keeps 5 ids a token; expected at most 4"),
        ("b", warm, record(1), "signal is at temperature 1.0; expected 2.0"),
        ("c", {"kind": "full"}, record(1), "signal is topk; expected full"),
        ("d", warm, record(1, row_id="X" * 32), "row_id is 'XXXX"),
    ):
        with (
            cache.Writer(tmp_path / name, fingerprint(signal=signal)) as writer,
            pytest.raises(cache.CacheError, match=re.escape(sentence)),
        ):
            writer.append(row)


def test_hidden_states_wait_for_the_teachers_head(tmp_path):
    with cache.Writer(tmp_path, fingerprint("hidden")) as writer:
        writer.append(record(0, "hidden"))
        with pytest.raises(cache.CacheError, match="hidden states need the teacher's head"):
            writer.commit("g0")
    assert write(tmp_path, range(2), "hidden").rows == 2
    with cache.Writer(tmp_path, fingerprint("hidden")) as writer:  # the cache has the head by now
        writer.append(record(2, "hidden"))
        assert writer.commit("g1").rows == 1


def test_the_head_comes_back_and_another_one_is_refused(tmp_path):
    write(tmp_path, range(2), "hidden")
    stored, expected = cache.open(tmp_path).head(), head()
    np.testing.assert_array_equal(stored.weight, expected.weight)
    np.testing.assert_array_equal(stored.bias, expected.bias)
    assert (stored.dtype, stored.scale, stored.softcap) == ("bfloat16", 0.5, 30.0)
    with pytest.raises(cache.CacheError, match=r"the cache's teacher head has sha256 .*, this teacher's has"):
        cache.Writer(tmp_path, fingerprint("hidden"), head=head(1))
    assert cache.open(tmp_path).verify() == []
    assert len(files(tmp_path / "heads")) == 1


def test_long_units_are_cut_into_record_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.shard.TOKENS_PER_BATCH", 10)
    write(tmp_path, range(30))
    (shard,) = cache.open(tmp_path).commit_records()
    tokens = [sum(1 + n % 6 for n in range(30))]
    assert len(shard.batches) == pytest.approx(tokens[0] / 12, rel=0.3)
    assert sum(batch.num_rows for batch in shard.batches) == 30
    snapshot = cache.open(tmp_path)
    for number in range(30):
        assert_same(snapshot[snapshot.position(row_id(number))], record(number))
    assert snapshot.verify() == []


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes the given number of bytes more."""

    def fill(free_bytes: int, code: int = errno.ENOSPC) -> None:
        left, write = [free_bytes], os.write

        def limited(fd: int, data: bytes) -> int:
            if len(data) > left[0]:
                raise OSError(code, os.strerror(code))
            left[0] -= len(data)
            return write(fd, data)

        monkeypatch.setattr(os, "write", limited)

    yield fill
    monkeypatch.undo()


@pytest.mark.parametrize("free_bytes", [0, 400, 3000, 5000, 6000, 7000])
def test_a_full_disk_ends_in_one_sentence_and_keeps_what_was_committed(
    tmp_path, full_disk, monkeypatch, free_bytes
):
    write(tmp_path, range(4), unit="g0")
    before = sorted(tmp_path.rglob("*"))
    full_disk(free_bytes)
    sentence = (
        f"No space left on {re.escape(str(tmp_path))}: 4 committed rows are kept; free space and rerun."
    )
    with cache.Writer(tmp_path, fingerprint()) as writer:
        for number in range(4, 12):
            writer.append(record(number))
        with pytest.raises(cache.CacheError, match=sentence) as caught:
            writer.commit("g1")
        assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    assert len(cache.open(tmp_path)) == 4
    assert cache.open(tmp_path).verify() == []
    write(tmp_path, range(4, 12), unit="g1")
    assert len(cache.open(tmp_path)) == 12


def test_a_full_disk_is_found_when_a_cache_is_begun(tmp_path, full_disk):
    full_disk(0)
    with pytest.raises(cache.CacheError, match=r"No space left on .*: 0 committed rows are kept"):
        cache.Writer(tmp_path / "new", fingerprint())


def test_a_full_disk_is_found_when_a_cache_is_opened_again(tmp_path, full_disk):
    write(tmp_path, range(4), "hidden")
    (tmp_path / "head.json").unlink()
    full_disk(0)
    with pytest.raises(cache.CacheError, match=r"No space left on .*: 4 committed rows are kept"):
        cache.Writer(tmp_path, fingerprint("hidden"), head=head())


def test_a_broken_disk_says_what_happened(tmp_path, full_disk):
    full_disk(0, errno.EIO)
    with pytest.raises(cache.CacheError, match=r"Input/output error while writing to .*; fix that and rerun"):
        cache.Writer(tmp_path / "new", fingerprint())


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(cache.CacheError, match="Not a directory while writing to"):
        cache.Writer(tmp_path / "file", fingerprint())
