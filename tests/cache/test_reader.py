"""Snapshots: order, immutability, what they cost, the tables they give, and what damage does to them."""

import hashlib
import json
import random
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import cache
from cache.__main__ import main
from tests.support.cache_samples import KEPT, KINDS, assert_same, files, fingerprint, record, row_id, write
from tests.support.plain_reader import read_signal


def test_a_file_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("text")
    assert not cache.exists(tmp_path / "file")


def test_rows_are_in_row_id_order_whatever_the_units(tmp_path):
    write(tmp_path, range(6, 12), unit="b")
    write(tmp_path, range(6), unit="a")
    snapshot = cache.open(tmp_path)
    ordered = sorted(range(12), key=row_id)
    assert snapshot.row_ids == [row_id(n) for n in ordered]
    for index, number in enumerate(ordered):
        assert_same(snapshot[index], record(number))
        assert snapshot.position(row_id(number)) == index
    assert_same(snapshot[-1], record(ordered[-1]))
    assert [row.row_id for row in snapshot] == snapshot.row_ids
    assert [row.row_id for row in snapshot[2:5]] == snapshot.row_ids[2:5]
    for index, row in zip([7, 0, 11, 7], snapshot.take([7, 0, 11, 7])):
        assert_same(row, snapshot[index])
    with pytest.raises(IndexError):
        snapshot[12]
    with pytest.raises(cache.CacheError, match=f"has no row {row_id(99)} among its 12 committed rows"):
        snapshot.position(row_id(99))


def test_a_snapshot_never_changes_and_refresh_sees_more(tmp_path):
    write(tmp_path, range(3), unit="a")
    old = cache.open(tmp_path)
    write(tmp_path, range(3, 6), unit="b")
    assert len(old) == 3
    new = old.refresh()
    assert (len(old), len(new)) == (3, 6)
    assert new.row_ids == sorted(row_id(n) for n in range(6))


def test_the_index_tells_of_every_row_without_a_shard(tmp_path):
    write(tmp_path, range(8))
    for name in files(tmp_path / "shards"):
        (tmp_path / "shards" / name).unlink()
    snapshot = cache.open(tmp_path)
    rows = snapshot.index.to_pylist()
    assert [row["row_id"] for row in rows] == snapshot.row_ids
    by_id = {row_id(n): record(n) for n in range(8)}
    for row in rows:
        expected = by_id[row["row_id"]]
        for name in ("run_id", "policy_step", "policy_hash", "refresh_index", "prompt_id"):
            assert row[name] == getattr(expected, name)
        assert row["num_prompt_tokens"] == len(expected.prompt_ids)
        assert row["num_completion_tokens"] == len(expected.completion_ids)
        assert row["unit"] == "g0000-00000"


def test_the_summary_counts_what_is_there(tmp_path):
    write(tmp_path, range(8), unit="a")
    write(tmp_path, range(8, 10), unit="b")
    summary = cache.open(tmp_path).summary()
    rows = [record(n) for n in range(10)]
    tokens = sum(len(row.completion_ids) for row in rows)
    assert (summary["rows"], summary["shards"], summary["scored_tokens"]) == (10, 2, tokens)
    assert summary["prompt_tokens"] == sum(len(row.prompt_ids) for row in rows)
    assert summary["bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert summary["bytes_per_token"] == summary["bytes"] / tokens
    assert summary["signal_bytes_per_token"] == summary["signal_bytes"] / tokens
    assert 0 < summary["signal_bytes"] < summary["bytes"]
    assert summary["finish_reasons"] == {"length": 4, "eos": 6}
    assert summary["refresh_indices"] == {"0": 4, "1": 4, "2": 2}
    assert [policy["rows"] for policy in summary["policies"]] == [4, 4, 2]
    assert summary["policies"][1]["policy_step"] == 10
    assert [policy["age"] for policy in summary["policies"]] == [20, 10, 0]
    assert (summary["duplicate_rows"], summary["leftover_files"]) == (0, 0)
    json.dumps(summary)


def test_quantiles_are_those_of_the_tokens(tmp_path):
    write(tmp_path, range(40))
    found = cache.open(tmp_path).summary()["quantiles"]
    columns: dict[str, Any] = {
        "behaviour_entropy": [record(n).behaviour_entropy for n in range(40)],
        "teacher_entropy": [record(n).teacher_entropy for n in range(40)],
        "tail_mass": [np.exp(record(n).log_tail_mass) for n in range(40)],
    }
    for name, parts in columns.items():
        values = np.concatenate(parts)
        for share, value in found[name].items():
            assert value == pytest.approx(np.quantile(values, float(share), method="inverted_cdf"), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_cache_and_every_signal_have_a_summary(tmp_path, kind):
    cache.Writer(tmp_path / "empty", fingerprint(kind))
    empty = cache.open(tmp_path / "empty")
    assert empty.summary()["bytes_per_token"] is None
    assert empty.index.num_rows == empty.to_table().num_rows == len(empty) == 0
    write(tmp_path / kind, range(4), kind)
    summary = cache.open(tmp_path / kind).summary()
    assert summary["signal"]["kind"] == kind
    assert (summary["quantiles"]["teacher_entropy"] is None) == (kind == "none")
    assert (summary["head_bytes"] > 0) == (kind == "hidden")
    if kind in ("hidden", "full"):
        assert summary["quantiles"]["tail_mass"]["0.5"] == 0


def test_the_table_holds_plain_columns_in_row_id_order(tmp_path):
    write(tmp_path, range(4), unit="a")
    write(tmp_path, range(4, 7), unit="b")
    snapshot = cache.open(tmp_path)
    table = snapshot.to_table()
    assert "signal" not in table.column_names
    assert table["row_id"].to_pylist() == snapshot.row_ids
    assert not any("halffloat" in str(field.type) for field in table.schema)
    for index, row in enumerate(table.to_pylist()):
        for name, value in row.items():
            expected = getattr(snapshot[index], name)
            assert value == (expected.tolist() if isinstance(expected, np.ndarray) else expected)
    assert snapshot.to_table(["policy_step", "row_id"]).column_names == ["policy_step", "row_id"]
    assert snapshot.to_table(["signal"])["signal"].null_count == 0
    with pytest.raises(cache.CacheError, match="has no column reward; it has row_id, prompt_id"):
        snapshot.to_table(["reward"])


def test_shards_are_arrow_files_that_say_what_they_are(tmp_path):
    write(tmp_path, range(4))
    (name,) = files(tmp_path / "shards")
    with pa.ipc.open_file(tmp_path / "shards" / name) as reader:
        assert reader.read_all().num_rows == 4
        metadata = {key.decode(): value.decode() for key, value in reader.schema.metadata.items()}
    assert (metadata["cache.format_version"], metadata["cache.signal_codec_version"]) == ("1", "2")


def test_format_md_is_enough_to_read_a_row(tmp_path):
    """Reads by the page alone: json, hashlib, Arrow and zstandard, nothing of this package."""
    write(tmp_path, range(4))
    (name,) = files(tmp_path / "commits")
    text = (tmp_path / "commits" / name).read_bytes()
    commit = json.loads(text)
    seal = commit.pop("sha256")
    canonical = json.dumps(commit, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert hashlib.sha256(canonical).hexdigest() == seal
    shard = (tmp_path / commit["shard"]).read_bytes()
    assert hashlib.sha256(shard).hexdigest() == commit["shard_sha256"]
    (batch,) = commit["batches"]
    message = shard[batch["offset"] : batch["offset"] + batch["num_bytes"]]
    assert hashlib.sha256(message).hexdigest() == batch["sha256"]
    reader = pa.ipc.open_file(shard)
    rows = pa.ipc.read_record_batch(pa.py_buffer(message), reader.schema).to_pylist()
    assert rows == reader.read_all().to_pylist()
    row, expected = rows[3], record(3)
    signal = read_signal(row["signal"])
    assert (signal["kind"], signal["shape"], signal["temperature"]) == (
        1,
        (len(row["completion_ids"]), KEPT),
        1.0,
    )
    assert signal["ids"] == expected.signal.ids.tolist()
    np.testing.assert_allclose(signal["logprobs"], expected.signal.logprobs, atol=1 / 16)
    np.testing.assert_allclose(signal["log_tail_mass"], expected.signal.log_tail_mass, rtol=1e-4)


def test_batches_are_kept_within_a_budget_and_checked_once(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.shard.TOKENS_PER_BATCH", 6)
    monkeypatch.setattr("cache.reader.BATCH_MEMORY_BYTES", 4000)
    write(tmp_path, range(24))
    snapshot, checked = cache.open(tmp_path), []
    import cache.reader as reader

    read: Any = reader.read_batch
    monkeypatch.setattr(
        reader, "read_batch", lambda *a, check: (checked.append(check), read(*a, check=check))[1]
    )
    for _ in range(3):
        assert sum(len(row.completion_ids) for row in snapshot) == sum(1 + n % 6 for n in range(24))
    (shard,) = snapshot.commit_records()
    assert sum(checked) == len(shard.batches) > 10
    assert len(checked) > sum(checked), "the budget is smaller than the cache: batches are read again"
    assert snapshot._batches._num_bytes <= 4000


def damage(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


def test_a_damaged_batch_is_refused_at_its_first_read(tmp_path):
    write(tmp_path, range(6))
    snapshot = cache.open(tmp_path)
    (shard,) = snapshot.commit_records()
    damage(tmp_path / shard.shard, shard.batches[0].offset + shard.batches[0].num_bytes // 2)
    with pytest.raises(cache.CacheError) as caught:
        snapshot[0]
    assert re.search(
        rf"{shard.shard} sha256 of record batch 0 \(rows 0 to 5\) is \w{{8}}…, but its commit record says"
        rf" {shard.batches[0].sha256[:8]}…\. Delete it and commits/g0000-00000-\w+\.json and rerun stage one",
        str(caught.value),
    )


def test_a_shard_that_is_short_or_gone_is_refused(tmp_path):
    write(tmp_path, range(6))
    (shard,) = cache.open(tmp_path).commit_records()
    path = tmp_path / shard.shard
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(cache.CacheError, match=rf"has {shard.shard_bytes - 1} bytes, but its commit record"):
        cache.open(tmp_path)[0]
    path.unlink()
    with pytest.raises(cache.CacheError, match="is missing, though a commit record names it"):
        cache.open(tmp_path)[0]


def test_a_damaged_commit_record_stops_readers_and_writers_and_is_found(tmp_path):
    write(tmp_path, range(3), unit="a")
    write(tmp_path, range(3, 6), unit="b")
    snapshot = cache.open(tmp_path)
    path = tmp_path / "commits" / files(tmp_path / "commits")[0]
    damage(path, 40)
    for use in (lambda: cache.open(tmp_path), lambda: cache.Writer(tmp_path, fingerprint())):
        with pytest.raises(cache.CacheError, match=r"Delete it and rerun stage one, which fills in its rows"):
            use()
    (finding,) = snapshot.verify()
    assert (finding.file, finding.record) == (f"commits/{path.name}", path.name)
    path.unlink()
    assert len(cache.open(tmp_path)) == 3
    write(tmp_path, range(3), unit="a")
    assert cache.open(tmp_path).row_ids == sorted(row_id(n) for n in range(6))


def test_every_flipped_bit_is_found_with_the_file_that_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.shard.TOKENS_PER_BATCH", 8)
    write(tmp_path, range(12), "hidden")
    snapshot, seed = cache.open(tmp_path), random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    shards = {record.shard: record for record in snapshot.commit_records()}
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    for _ in range(150):
        path = rng.choice(paths)
        position = rng.randrange(path.stat().st_size)
        damage(path, position, bit := rng.randrange(8))
        name = path.relative_to(tmp_path).as_posix()
        found = snapshot.verify()
        assert found, (name, position, bit)
        assert any(path.name in str(finding) for finding in found), (name, found)
        if name in shards:
            assert_names_the_rows(found, shards[name], position)
        damage(path, position, bit)
    assert snapshot.verify() == []


def assert_names_the_rows(found, shard, position):
    first = 0
    for entry in shard.batches:
        last = first + entry.num_rows - 1
        if entry.offset <= position < entry.offset + entry.num_bytes:
            assert [finding.rows for finding in found] == [(first, last)]
            assert f"rows {first} to {last} are damaged" in str(found[0])
            return
        first = last + 1
    assert "its rows are intact, but the bytes around them are not" in str(found[0])


def test_every_truncation_is_found_and_never_raises(tmp_path):
    write(tmp_path, range(4))
    snapshot = cache.open(tmp_path)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for size in {0, 1, 7, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:size])
            found = snapshot.verify()
            assert any(path.name in str(finding) for finding in found), (path, size)
        path.unlink()
        assert (
            any(path.name in str(finding) for finding in snapshot.verify()) or path.parent.name == "commits"
        )
        path.mkdir()
        assert snapshot.verify()
        path.rmdir()
        path.write_bytes(whole)
    assert snapshot.verify() == []


def test_verify_checks_the_rows_behind_sound_digests(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.writer.check_record", lambda *_: None)
    with cache.Writer(tmp_path, fingerprint()) as writer:
        writer.append(record(3, teacher_logprobs=[0, -np.inf, 0, 0]))
        writer.commit("g0")
    (finding,) = cache.verify(tmp_path)
    assert finding.rows == (0, 0)
    assert f"{finding.file} is not what was committed: row {row_id(3)}: teacher_logprobs[1] is -inf" in str(
        finding
    )


def test_there_must_be_a_cache(tmp_path):
    for use in (cache.open, cache.verify):
        with pytest.raises(cache.CacheError, match=r"nowhere holds no cache \(no fingerprint\.json\)"):
            use(tmp_path / "nowhere")


def test_opening_many_rows_is_quick(tmp_path):
    with cache.Writer(tmp_path, fingerprint("none")) as writer:
        for unit in range(8):
            for number in range(unit * 250, unit * 250 + 250):
                writer.append(record(number, "none", num_tokens=2))
            writer.commit(f"g{unit}")
    start = time.perf_counter()
    assert len(cache.open(tmp_path)) == 2000
    assert time.perf_counter() - start < 0.3


def test_importing_the_cache_is_light():
    code = (
        "import sys, time; start = time.process_time(); import cache; print(time.process_time() -"
        " start);print(' '.join(m for m in ('torch', 'transformers', 'pandas', 'tokenizers',"
        " 'pyarrow.dataset', 'pyarrow.compute', 'dualkl', 'stages') if m in sys.modules))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in "ab"
    ]
    seconds, heavy = zip(*(output.split("\n")[:2] for output in outputs), strict=True)
    assert set(heavy) == {""}
    assert min(map(float, seconds)) < 0.5


@pytest.mark.parametrize("missing", [{0, 2}, {0, 1, 2, 3}])
def test_rows_without_a_behaviour_entropy_are_read_shown_and_exported(tmp_path, capsys, missing):
    with cache.Writer(tmp_path / "cache", fingerprint()) as writer:
        for number in range(4):
            changes = {"behaviour_entropy": None} if number in missing else {}
            writer.append(record(number, **changes))
        writer.commit("a")
    snapshot = cache.open(tmp_path / "cache")
    for number in range(4):
        found = snapshot[snapshot.position(record(number).row_id)].behaviour_entropy
        if number in missing:
            assert found is None
        else:
            np.testing.assert_array_equal(found, record(number).behaviour_entropy)
    assert snapshot.verify() == []
    assert snapshot.to_table(["behaviour_entropy"])["behaviour_entropy"].null_count == len(missing)
    assert (snapshot.summary()["quantiles"]["behaviour_entropy"] is None) == (len(missing) == 4)
    root = str(tmp_path / "cache")
    for command in (["summary", root], ["view", root], ["show", "--row", record(0).row_id, root]):
        assert main(command) == 0
    assert main(["export", "--to", "parquet", root, str(tmp_path / "out")]) == 0
    assert parquet.read_table(tmp_path / "out")["behaviour_entropy"].null_count == len(missing)
    capsys.readouterr()
