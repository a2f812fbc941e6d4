"""`cache.export`: what other tools read of an exported cache, what it refuses, and how much it holds in
memory.
"""

import json
import os
import weakref
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cache
from cache.__main__ import main
from cache.export import _lock, export
from cache.reader import PLAIN_COLUMNS, Snapshot
from cache.schema import TEACHER_COLUMNS
from tests.support.cache_samples import KINDS, VOCAB, WIDTH, fingerprint, head, log_softmax, record, write


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A cache of each kind in three shards of several record batches, and both exports of it."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cache.shard.TOKENS_PER_BATCH", 6)
        for unit, numbers in (("a", range(5)), ("b", range(5, 11)), ("c", range(11, 14))):
            write(folder / "cache", numbers, request.param, unit)
    snapshot = cache.open(folder / "cache")
    assert len(snapshot.places()) > 5
    export(snapshot, str(folder / "parquet"))
    return snapshot, folder


def decoded(row: cache.Record) -> dict[str, object]:
    """A row as plain Python values, its signal written out slot by slot."""
    values = {name: getattr(row, name) for name in PLAIN_COLUMNS}
    signal = row.signal
    if isinstance(signal, cache.TopK):
        for name, matrix in (("signal_ids", signal.ids), ("signal_logprobs", signal.logprobs)):
            values[name] = [
                [x for i, x in zip(ids, line, strict=True) if i != -1]
                for ids, line in zip(signal.ids.tolist(), matrix.tolist(), strict=True)
            ]
    elif isinstance(signal, cache.Hidden):
        values["signal_states"] = cache.to_float32(signal.states, signal.dtype)
    elif isinstance(signal, cache.Full):
        values["signal_logits"] = cache.to_float32(signal.logits, signal.dtype)
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()
    }


def assert_rows(snapshot, rows):
    """`rows`, as dicts, are exactly the snapshot's, each once, in any order."""
    found = {row["row_id"]: row for row in rows}
    assert len(rows) == len(found) == len(snapshot)
    for row in snapshot:
        expected = decoded(row)
        assert list(found[row.row_id]) == list(expected)
        assert found[row.row_id] == expected


def nested(kind):
    return pa.list_(pa.list_(kind))


def signal_types(kind):
    return {
        "none": {},
        "topk": {"signal_ids": nested(pa.int32()), "signal_logprobs": nested(pa.float32())},
        "nucleus": {"signal_ids": nested(pa.int32()), "signal_logprobs": nested(pa.float32())},
        "hidden": {"signal_states": nested(pa.float32())},
        "full": {"signal_logits": nested(pa.float16())},
    }[kind]


def test_parquet_holds_every_row_with_typed_columns(made):
    snapshot, folder = made
    kind = snapshot.fingerprint.rules.kind
    table = pq.read_table(folder / "parquet")
    assert_rows(snapshot, table.to_pylist())
    assert table.schema.names == [*PLAIN_COLUMNS, *signal_types(kind)]
    for name, wanted in signal_types(kind).items():
        assert table.schema.field(name).type.equals(wanted)
    if kind == "none":
        assert all(table[name].null_count == len(table) for name in TEACHER_COLUMNS)


def test_parquet_has_a_row_group_a_batch_zstd_and_the_fingerprint(made):
    snapshot, folder = made
    assert [path.name for path in (folder / "parquet").iterdir()] == ["part-00000.parquet"]
    file = pq.ParquetFile(folder / "parquet" / "part-00000.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sizes == [len(place.rows) for place in snapshot.places()]
    assert {file.metadata.row_group(0).column(i).compression for i in range(file.metadata.num_columns)} == {
        "ZSTD"
    }
    metadata = {key.decode(): json.loads(value) for key, value in file.schema_arrow.metadata.items()}
    assert metadata == {
        "cache.must_match": snapshot.fingerprint.must_match,
        "cache.recorded": snapshot.fingerprint.recorded,
        "cache.temperature": 1.0,
    }


def test_polars_reads_the_parquet(made):
    import polars

    snapshot, folder = made
    assert_rows(snapshot, polars.read_parquet(folder / "parquet" / "*.parquet").to_dicts())


def test_duckdb_reads_the_parquet(made):
    import duckdb

    snapshot, folder = made
    found = duckdb.sql(f"select * from '{folder}/parquet/*.parquet'")
    assert_rows(snapshot, [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()])


def test_datasets_reads_the_parquet(made, tmp_path):
    import datasets

    snapshot, folder = made
    found = datasets.load_dataset(
        "parquet", data_files=f"{folder}/parquet/*.parquet", split="train", cache_dir=str(tmp_path)
    )
    assert_rows(snapshot, list(found))
    assert found.features["behaviour_logprobs"] == datasets.List(datasets.Value("float32"))


def test_files_are_of_bounded_size(made, tmp_path, monkeypatch):
    snapshot, _ = made
    monkeypatch.setattr("cache.export.FILE_BYTES", 1)
    done = export(snapshot, str(tmp_path / "out"))
    num_places = len(snapshot.places())
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"part-{i:05}.parquet" for i in range(num_places)]
    assert_rows(snapshot, pq.read_table(tmp_path / "out").to_pylist())
    assert (done.rows, done.files) == (14, len(names))
    assert done.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_rows_of_one_record_batch_at_a_time_are_alive(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.shard.TOKENS_PER_BATCH", 12)
    write(tmp_path / "cache", range(120))
    snapshot = cache.open(tmp_path / "cache")
    places = snapshot.places()
    read, alive, most = Snapshot.read_place, weakref.WeakSet[cache.Record](), []

    def counted(self, place):
        rows = read(self, place)
        alive.update(rows)
        most.append(len(alive))
        return rows

    monkeypatch.setattr(Snapshot, "read_place", counted)
    export(snapshot, str(tmp_path / "out"))
    assert len(most) == len(places) > 20
    assert max(most) == max(len(place.rows) for place in places)


def test_a_row_that_two_units_hold_is_exported_once(tmp_path):
    """The second unit's commit record is a copy that a writer with another plan could have made."""
    write(tmp_path / "one", range(4), unit="a")
    write(tmp_path / "two", range(2, 7), unit="b")
    for part in ("shards", "commits"):
        for path in (tmp_path / "two" / part).iterdir():
            path.rename(tmp_path / "one" / part / path.name)
    snapshot = cache.open(tmp_path / "one")
    assert snapshot.summary()["duplicate_rows"] == 2
    assert export(snapshot, str(tmp_path / "out")).rows == 7
    assert_rows(snapshot, pq.read_table(tmp_path / "out").to_pylist())


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_cache_is_one_file_without_rows(tmp_path, kind):
    cache.Writer(tmp_path / "cache", fingerprint(kind), head=head() if kind == "hidden" else None).__enter__()
    snapshot = cache.open(tmp_path / "cache")
    assert export(snapshot, str(tmp_path / "parquet")).rows == 0
    assert pq.read_table(tmp_path / "parquet").schema.names == [*PLAIN_COLUMNS, *signal_types(kind)]
    assert pq.read_table(tmp_path / "parquet").num_rows == 0


def test_states_of_every_dtype_come_out_exactly(tmp_path):
    rng = np.random.default_rng(0)
    for dtype, kind in (("float32", pa.float32()), ("float16", pa.float16())):
        states = rng.normal(size=(4, WIDTH)).astype(dtype)
        with cache.Writer(tmp_path / dtype, fingerprint("hidden"), head=head()) as writer:
            writer.append(record(3, "hidden", signal=cache.Hidden(states, dtype)))
            writer.commit("a")
        export(cache.open(tmp_path / dtype), str(tmp_path / f"{dtype}-out"))
        column = pq.read_table(tmp_path / f"{dtype}-out")["signal_states"]
        assert column.type.value_type.value_type == kind
        np.testing.assert_array_equal(column[0].values.flatten().to_numpy().reshape(4, WIDTH), states)


def test_wider_states_after_float16_ones_are_refused_rather_than_rounded(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = {}
    with cache.Writer(tmp_path / "cache", fingerprint("full")) as writer:
        for number in range(8):
            row = record(number, "full")
            dtype = "float16" if row.row_id == min(record(i, "full").row_id for i in range(8)) else "float32"
            logits = log_softmax(rng.normal(size=(len(row.completion_ids), VOCAB))).astype(dtype)
            writer.append(record(number, "full", signal=cache.Full(logits, dtype)))
            dtypes[row.row_id] = dtype
        writer.commit("a")
    assert Counter(dtypes.values()) == {"float16": 1, "float32": 7}
    with pytest.raises(
        cache.CacheError, match="its signal is in float32, that of the cache's first row in float16"
    ):
        export(cache.open(tmp_path / "cache"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_crash_half_way_leaves_no_export(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.shard.TOKENS_PER_BATCH", 6)
    write(tmp_path / "cache", range(12))
    read, count = Snapshot.read_place, [0]

    def failing(self, place):
        count[0] += 1
        if count[0] == 3:
            assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]
            raise KeyboardInterrupt
        return read(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "read_place", failing)
        with pytest.raises(KeyboardInterrupt):
            export(cache.open(tmp_path / "cache"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    left, other = tmp_path / ".out-0123abcd.partial", tmp_path / ".out-4567abcd.partial"
    for folder in (left, other):  # of a process that was killed, and of one that is at work
        folder.mkdir()
    held = _lock(other)
    assert export(cache.open(tmp_path / "cache"), str(tmp_path / "out")).rows == 12
    assert (left.exists(), other.exists()) == (False, True)
    os.close(held)


def test_damage_ends_in_a_sentence_and_leaves_no_export(tmp_path, capsys):
    write(tmp_path / "cache", range(4))
    (path,) = (tmp_path / "cache" / "shards").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert main(["export", "--to", "parquet", str(tmp_path / "cache"), str(tmp_path / "out")]) == 2
    assert f"error: {path} sha256 of record batch 0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_the_command_says_what_it_wrote_and_never_overwrites(tmp_path, capsys):
    write(tmp_path / "cache", range(4))
    out = tmp_path / "new" / "out"
    command = ["export", "--to", "parquet", str(tmp_path / "cache"), str(out)]
    out.mkdir(parents=True)  # an empty folder is as good as none
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    size = sum(map(len, before.values()))
    assert capsys.readouterr().out == f"{out}: 4 rows in 1 file, {size:,} bytes.\n"
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err
        == f"error: {out} is not empty; give a new folder or an empty one. Nothing was changed.\n"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_wrong_input_of_export_ends_in_one_sentence_and_code_2(tmp_path, capsys):
    write(tmp_path / "cache", range(2))
    (tmp_path / "file").write_text("mine")
    for root, out, sentence in (
        ("nowhere", "out", "nowhere holds no cache"),
        (str(tmp_path / "cache"), str(tmp_path / "file"), "exists and is not a folder; give a new"),
        (str(tmp_path / "cache"), "s3://bucket/out", "is a URL; export writes to a local folder"),
        (str(tmp_path / "cache"), str(tmp_path / "file" / "out"), "cannot be written ("),
        (str(tmp_path / "cache"), str(tmp_path / "cache"), "is not empty"),
    ):
        assert main(["export", "--to", "parquet", root, out]) == 2
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1)
        assert sentence in captured.err
    assert (tmp_path / "file").read_text() == "mine"
    assert main(["export", str(tmp_path / "cache"), "out"]) == 2
    assert "--to is missing" in capsys.readouterr().err
