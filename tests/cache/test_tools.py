"""The README's way to open a cache with other tools: its very code blocks, compared with what a snapshot
reads.
"""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import cache
from cache.reader import PLAIN_COLUMNS
from tests.conftest import ROOT
from tests.support.cache_samples import write

SECTION = "## Open the cache with your own tools"
NAMES = ("shards", "dataset", "frame", "arrow", "pandas_frame", "entropies")


def blocks() -> list[str]:
    section = (ROOT / "README.md").read_text().split(f"{SECTION}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The names that the README's blocks bind, run on three small shards."""
    root = tmp_path_factory.mktemp("cache")
    for unit, numbers in (("a", range(4)), ("b", range(4, 9)), ("c", range(9, 11))):
        write(root, numbers, unit=unit)
    (root / "shards" / "of-a-writer-that-died.arrow").write_bytes(b"no Arrow file")
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        for block in blocks():
            exec(block.replace("runs/demo/cache", str(root)), names)
    assert names.keys() >= set(NAMES)
    return names


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


def assert_rows(opened, rows, columns):
    """`rows`, as dicts, are the snapshot's rows in any order, with exactly `columns`."""
    found = {row["row_id"]: {name: plain(value) for name, value in row.items()} for row in rows}
    snapshot = opened["snapshot"]
    assert len(rows) == len(found) == len(snapshot) == 11
    for record in snapshot:
        assert found[record.row_id] == {name: plain(getattr(record, name)) for name in columns}


def test_the_paths_are_those_of_the_commit_records_in_their_order(opened):
    snapshot = opened["snapshot"]
    assert opened["shards"] == [
        str(Path(snapshot.root) / record.shard) for record in snapshot.commit_records()
    ]
    assert [record.unit for record in snapshot.commit_records()] == ["a", "b", "c"]
    assert isinstance(opened["record"], cache.Record)


def test_datasets_reads_the_plain_columns(opened):
    assert_rows(opened, list(opened["dataset"]), PLAIN_COLUMNS)


def test_polars_reads_the_plain_columns(opened):
    assert_rows(opened, opened["frame"].to_dicts(), PLAIN_COLUMNS)


def test_pandas_reads_the_plain_columns(opened):
    columns = ["row_id", "finish_reason", "teacher_entropy"]
    assert_rows(opened, opened["pandas_frame"].to_dict("records"), columns)
    assert_rows(
        opened, opened["arrow"].to_table(list(PLAIN_COLUMNS)).to_pandas().to_dict("records"), PLAIN_COLUMNS
    )


def test_duckdb_reads_the_plain_columns(opened):
    import duckdb

    arrow = opened["arrow"]
    rows = duckdb.arrow(arrow).project(", ".join(PLAIN_COLUMNS))
    assert_rows(
        opened, [dict(zip(PLAIN_COLUMNS, row, strict=True)) for row in rows.fetchall()], PLAIN_COLUMNS
    )
    means = defaultdict(list)
    for record in opened["snapshot"]:
        means[record.finish_reason].append(record.teacher_entropy.mean(dtype=np.float64))
    expected = {reason: pytest.approx(np.mean(values)) for reason, values in means.items()}
    assert dict(opened["entropies"]) == expected
