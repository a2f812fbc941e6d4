"""Caches of a released format stay readable: the frozen ones in tests/data, one for each signal kind.

If a test here fails, the reader has changed, not the files. A new format version gets its own frozen caches.
`python -m tests.support.frozen_cache tests/data/cache_v1` made these.
"""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

import cache
from cache.schema import SCALAR_COLUMNS, TOKEN_COLUMNS
from tests.support.frozen_cache import CACHES, FROZEN, readable
from tests.support.plain_reader import read_signal

# The sealed commit records name the digests of all that is in a shard; these are the records' own.
COMMIT_SHA256 = {
    "cache_v1/topk": "906bf13c18efb08bcef4ddb0ca7266f919db46b29399d467f198f50904f80019",
    "cache_v1/nucleus": "a2a495ce93d4d6e9a96cae3e9be538455272321cb712c7fafe4ee7bcb74f074a",
    "cache_v1/hidden": "56ea1ff8fe4d8b69498baacefdad4f122a40882939d687e16944f710fa0ba4d6",
    "cache_v1/full": "cd73b651668e5d1dbb2f9d73f4d328a59f3c3892d8a94836d058de47fe48b322",
}
TOLERANCE = 2e-5  # nats: a reader may compute in float32


def expected_of(name):
    return json.loads((FROZEN / name / "expected.json").read_text())


def assert_close(actual, expected, name):
    """Equal, floats within `TOLERANCE`; null stands for -inf."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            assert_close(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), name
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_close(*pair, f"{name}[{index}]")
    else:
        assert actual == (
            pytest.approx(expected, abs=TOLERANCE) if isinstance(expected, float) else expected
        ), name


@pytest.mark.parametrize("name", CACHES)
def test_the_reader_finds_what_was_frozen(name):
    snapshot = cache.open(FROZEN / name)
    assert_close([readable(record) for record in snapshot], expected_of(name)["rows"], name)
    assert snapshot.verify() == []


@pytest.mark.parametrize("name", CACHES)
def test_the_plain_reader_finds_what_was_frozen(name):
    (path,) = (FROZEN / name / "commits").iterdir()
    shard = FROZEN / name / json.loads(path.read_text())["shard"]
    rows = sorted(pa.ipc.open_file(shard).read_all().to_pylist(), key=lambda row: row["row_id"])
    for row, expected in zip(rows, expected_of(name)["rows"], strict=True):
        for column in (*SCALAR_COLUMNS, *TOKEN_COLUMNS):
            own = (
                [None if value == -np.inf else value for value in row[column]]
                if column in TOKEN_COLUMNS
                else row[column]
            )
            assert_close(own, expected[column], column)
        signal, wanted = read_signal(row["signal"]), expected["signal"]
        if name.endswith("hidden"):
            assert signal["bytes"] == np.array(wanted["states"], "<u2").tobytes()
        elif name.endswith("full"):
            assert signal["bytes"] == np.array(wanted["logits"], "<f2").tobytes()
        else:
            assert_close({part: signal[part] for part in wanted}, wanted, "signal")


@pytest.mark.parametrize("name", CACHES)
def test_the_digests_of_the_commit_record_hold(name):
    (path,) = (FROZEN / name / "commits").iterdir()
    commit = json.loads(path.read_bytes())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == COMMIT_SHA256[name]
    shard = (FROZEN / name / commit["shard"]).read_bytes()
    assert (len(shard), hashlib.sha256(shard).hexdigest()) == (commit["shard_bytes"], commit["shard_sha256"])
    for entry in commit["batches"]:
        message = shard[entry["offset"] : entry["offset"] + entry["num_bytes"]]
        assert hashlib.sha256(message).hexdigest() == entry["sha256"]


def test_the_frozen_head_is_read():
    head, expected = cache.open(FROZEN / "cache_v1/hidden").head(), expected_of("cache_v1/hidden")["head"]
    assert head is not None
    assert head.bias is not None
    assert (list(head.weight.shape), head.dtype) == (expected["shape"], expected["dtype"])
    assert (head.scale, head.softcap) == (expected["scale"], expected["softcap"])
    assert head.weight[0].tolist() == expected["first_row"]
    np.testing.assert_allclose(head.bias[:5], expected["bias"], rtol=1e-5)


def test_nucleus_rows_are_ragged():
    counts = {len(ids) for row in expected_of("cache_v1/nucleus")["rows"] for ids in row["signal"]["ids"]}
    assert counts == {1, 2, 3, 4, 5}
