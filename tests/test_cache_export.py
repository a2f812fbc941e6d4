"""Export: what other tools read is what a snapshot reads, in bounded memory, and half an export is none."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, load_from_disk

import cache
from cache import export as module
from cache.__main__ import main
from cache.export import export
from cache.reader import Snapshot
from cache.schema import SCALAR_COLUMNS, TOKEN_COLUMNS
from tests.cache_samples import KINDS, fingerprint, write

NUM_ROWS = 11


@pytest.fixture(params=KINDS)
def snapshot(tmp_path: Path, request: pytest.FixtureRequest) -> Snapshot:
    write(tmp_path / "cache", range(5), request.param, unit="a")
    write(tmp_path / "cache", range(5, NUM_ROWS), request.param, unit="b")
    return cache.open(tmp_path / "cache")


def signal_columns(record: cache.Record) -> dict[str, Any]:
    """What the signal of a row should look like as lists, independently of the exporter."""
    signal = record.signal
    if signal is None:
        return {}
    if isinstance(signal, cache.TopK):
        counts = (signal.ids >= 0).sum(1)
        return {
            "signal_ids": [row[:n].tolist() for row, n in zip(signal.ids, counts, strict=True)],
            "signal_logprobs": [row[:n].tolist() for row, n in zip(signal.logprobs, counts, strict=True)],
        }
    if isinstance(signal, cache.Hidden):
        return {"signal_states": cache.to_float32(signal.states, signal.dtype).tolist()}
    return {"signal_logits": signal.logits.astype(np.float64).tolist()}


def assert_rows(found: list[dict[str, Any]], snapshot: Snapshot) -> None:
    """Each row of the snapshot once, every column equal, and no column more."""
    assert sorted(row["row_id"] for row in found) == snapshot.row_ids
    for row in found:
        record = snapshot[snapshot.position(row["row_id"])]
        expected: dict[str, Any] = {name: getattr(record, name) for name in SCALAR_COLUMNS}
        for name in TOKEN_COLUMNS:
            value = getattr(record, name)
            expected[name] = None if value is None else value.tolist()
        expected |= signal_columns(record)
        assert row == expected


def test_parquet_holds_every_row_decoded(snapshot: Snapshot, tmp_path: Path) -> None:
    done = export(snapshot, "parquet", str(tmp_path / "out"))
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["part-00000.parquet"]
    assert (done.rows, done.files, done.bytes) == (NUM_ROWS, 1, files[0].stat().st_size)
    table = parquet.read_table(tmp_path / "out")
    assert_rows(table.to_pylist(), snapshot)
    stored = parquet.ParquetFile(files[0])
    assert stored.num_row_groups == 2
    metadata = stored.schema_arrow.metadata
    assert json.loads(metadata[b"cache.must_match"]) == snapshot.fingerprint.must_match
    assert json.loads(metadata[b"cache.recorded"]) == snapshot.fingerprint.recorded
    assert json.loads(metadata[b"cache.temperature"]) == 1.0


def test_polars_and_duckdb_read_the_parquet(snapshot: Snapshot, tmp_path: Path) -> None:
    export(snapshot, "parquet", str(tmp_path / "out"))
    assert_rows(polars.read_parquet(tmp_path / "out/*.parquet").to_dicts(), snapshot)
    query = f"select row_id, len(completion_ids) as n from '{tmp_path}/out/*.parquet' order by row_id"
    lengths = [len(record.completion_ids) for record in snapshot]
    assert duckdb.sql(query).fetchall() == list(zip(snapshot.row_ids, lengths, strict=True))


def test_datasets_loads_the_folder_with_its_types(snapshot: Snapshot, tmp_path: Path) -> None:
    done = export(snapshot, "datasets", str(tmp_path / "out"))
    dataset = load_from_disk(str(tmp_path / "out"))
    assert isinstance(dataset, Dataset)
    assert len(dataset) == done.rows == NUM_ROWS
    assert_rows(list(dataset), snapshot)
    again = tmp_path / "again"
    dataset.save_to_disk(str(again))
    assert load_from_disk(str(again)).features == dataset.features
    assert (
        json.loads((again / "dataset_info.json").read_text())["features"]
        == (json.loads((tmp_path / "out/dataset_info.json").read_text())["features"])
    )


@pytest.mark.parametrize("form", ["parquet", "datasets"])
def test_large_exports_are_several_files(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for unit in range(3):
        write(tmp_path / "cache", range(3 * unit, 3 * unit + 3), unit=f"g{unit}")
    monkeypatch.setattr(module, "FILE_BYTES", 100)
    snapshot = cache.open(tmp_path / "cache")
    assert export(snapshot, form, str(tmp_path / "out")).files == (3 if form == "parquet" else 5)
    found = parquet.read_table(tmp_path / "out").to_pylist() if form == "parquet" else load_from_disk(tmp_path / "out")
    assert_rows(list(found), snapshot)


@pytest.mark.parametrize("form", ["parquet", "datasets"])
def test_an_empty_cache_exports_no_rows(tmp_path: Path, form: str) -> None:
    cache.Writer(tmp_path / "cache", fingerprint())
    assert export(cache.open(tmp_path / "cache"), form, str(tmp_path / "out")).rows == 0
    found = parquet.read_table(tmp_path / "out") if form == "parquet" else load_from_disk(str(tmp_path / "out"))
    assert len(found) == 0


def test_a_few_record_batches_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for unit in range(12):
        write(tmp_path / "cache", range(2 * unit, 2 * unit + 2), unit=f"g{unit:02}")
    alive: set[int] = set()
    most = 0
    read_place = Snapshot.read_place

    def counted(self: Snapshot, place: Any) -> list[cache.Record]:
        nonlocal most
        records = read_place(self, place)
        for record in records:
            alive.add(id(record))
            weakref.finalize(record, alive.discard, id(record))
        gc.collect()
        most = max(most, len(alive))
        return records

    monkeypatch.setattr(Snapshot, "read_place", counted)
    export(cache.open(tmp_path / "cache"), "parquet", str(tmp_path / "out"))
    assert 2 <= most <= 6


def test_nothing_is_overwritten_and_half_an_export_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = str(tmp_path / "cache"), tmp_path / "out"
    write(tmp_path / "cache", range(4))
    out.mkdir()
    (out / "mine").write_text("keep")
    assert main(["export", "--to", "parquet", root, str(out)]) == 2
    assert "out is not empty; give a new folder or an empty one. Nothing was changed." in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert main(["export", "--to", "parquet", root, str(out / "mine")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["export", "--to", "parquet", root, "s3://bucket/out"]) == 2
    assert "export writes to a local folder" in capsys.readouterr().err

    def fail(self: Snapshot, place: Any) -> list[cache.Record]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "read_place", fail)
        assert main(["export", "--to", "datasets", root, str(tmp_path / "new")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]
    assert main(["export", "--to", "datasets", root, str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'new'}: 4 rows in 3 files, ")
