"""A cache of many shards: seconds to open it, to commit the next shard, to summarise and to verify it.

    python -m bench.cache_scale --shards 10000 [--folder /tmp/scale]

Writes that many shards of one small row each by one writer, timing the last hundred commits, then measures a
new reader and a new writer in this process. Files are in the page cache as the machine leaves them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cache
from tests.support.cache_samples import fingerprint, record

LAST = 100


def write(root: Path, numbers: range) -> list[float]:
    """Seconds of each commit by one writer."""
    seconds = []
    with cache.Writer(root, fingerprint()) as writer:
        for number in numbers:
            started = time.perf_counter()
            writer.append(record(number))
            writer.commit(f"g0000-{number:05}")
            seconds.append(time.perf_counter() - started)
    return seconds


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where the cache goes (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary) / "cache"
        total, commits = timed(lambda: write(root, range(options.shards)))
        print(
            f"{options.shards:,} shards written in {total:.0f} s; commits of the first {LAST}:"
            f" {_of(commits[:LAST])}"
        )
        print(f"commits of the last {LAST}: {_of(commits[-LAST:])}")
        opened, snapshot = timed(lambda: cache.open(root))
        print(f"open: {opened:.2f} s, {len(snapshot):,} rows")
        print(
            "a new writer's first commit:"
            f" {timed(lambda: write(root, range(options.shards, options.shards + 1)))[0]:.2f} s"
        )
        summarised, _ = timed(cache.open(root).summary)
        print(f"summary: {summarised:.2f} s")
        verified, found = timed(cache.open(root).verify)
        print(f"verify: {verified:.1f} s, {len(found)} damages")


def _of(seconds: list[float]) -> str:
    return f"median {np.median(seconds) * 1e3:.1f} ms, largest {max(seconds) * 1e3:.1f} ms"


if __name__ == "__main__":
    main()
