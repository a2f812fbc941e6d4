"""Summary figures of a cache, from its commit records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from cache import commit
from cache.commit import CommitRecord
from cache.fingerprint import Fingerprint
from cache.heads import head_files
from cache.statistics import merge, quantiles
from cache.store import Store

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_POLICY = ("run_id", "policy_step", "policy_hash", "refresh_index")


def summarise(
    store: Store, fingerprint: Fingerprint, records: Sequence[CommitRecord], index: pa.Table
) -> dict[str, Any]:
    """Return counts, sizes in bytes, policies and quantiles over tokens as plain JSON.

    `records` are the cache's commit records and `index` its distinct rows (`Snapshot.index`).

    Entropies are in nats, tail mass is a share. `bytes` covers shards, commit records, fingerprint, tokenizer
    and teacher head; `signal_bytes` the packed signals in the shards. Both per scored token are None without
    rows. A policy's `age` is in optimizer steps behind the newest policy of its run.
    """
    totals = merge(record.statistics for record in records)
    tokens = sum(index["num_completion_tokens"].to_pylist())
    policies = Counter(zip(*(index[name].to_pylist() for name in _POLICY), strict=True))
    newest: dict[str, int] = {}
    for run, step, *_ in policies:
        newest[run] = max(step, newest.get(run, step))
    sizes = _sizes(store, records)
    return {
        "root": store.root,
        "signal": fingerprint.must_match["signal"],
        "rows": len(index),
        "shards": len(records),
        "prompt_tokens": sum(index["num_prompt_tokens"].to_pylist()),
        "scored_tokens": tokens,
        "signal_bytes": totals.signal_bytes,
        **sizes,
        "bytes_per_token": sizes["bytes"] / tokens if tokens else None,
        "signal_bytes_per_token": totals.signal_bytes / totals.scored_tokens if tokens else None,
        "policies": [
            {**dict(zip(_POLICY, key, strict=True)), "age": newest[key[0]] - key[1], "rows": n}
            for key, n in sorted(policies.items())
        ],
        "refresh_indices": _count(index["refresh_index"].to_pylist()),
        "finish_reasons": dict(totals.finish_reasons),
        "quantiles": {name: quantiles(histogram, QUANTILES) for name, histogram in totals.histograms.items()},
        "duplicate_rows": totals.rows - len(index),
    }


def _sizes(store: Store, records: Sequence[CommitRecord]) -> dict[str, int]:
    """Return bytes on disk: total, teacher head, and files not named by any commit record."""
    head = sum(store.size(name) or 0 for name in head_files(store))
    of_records = store.sizes(commit.COMMITS)
    small = sum(store.size(name) or 0 for name in (commit.FINGERPRINT, commit.TOKENIZER))
    small += sum(of_records.get(record.name, 0) for record in records)
    shards = sum(record.shard_bytes for record in records)
    newest = commit.read_records(store, {record.name: record for record in records})
    left = commit.leftovers(store, [record.shard for record in newest.values()])
    return {
        "bytes": shards + small + head,
        "head_bytes": head,
        "leftover_files": len(left),
        "leftover_bytes": sum(left.values()),
    }


def _count(values: list[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}
