"""Opening, summarising and streaming large caches: seconds, rates and the reader's memory.

    python bench/cache_reading.py --gigabytes 1 10 --folder runs/cache_reading --out bench/results

Writes a cache of each size (top-64 at 151,936 ids, rows of 256 tokens, units of 128 rows) unless it is there,
then measures in fresh processes: `import cache`, `cache.open`, `summary`, and `cache.stream` over all rows
with the peak of the process's anonymous memory (what it allocated; mapped shard pages are the kernel's to
drop). Files are in the page cache as the machine leaves them. Writes cache_reading.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cache

V, K, T, UNIT = 151_936, 64, 256, 128
SIGNAL = {"kind": "topk", "k": K, "temperature": 1.0}
MUST_MATCH = {
    "teacher": "random",
    "teacher_dtype": "bfloat16",
    "tokenizer": "none",
    "chat_template": "",
    "chat_template_kwargs": {},
    "vocab_size": V,
    "signal": SIGNAL,
}


def rows(seed: int) -> Iterator[dict[str, Any]]:
    """Rows whose distributions fall off as a language model's do: some tokens peaked, some flat."""
    rng = np.random.default_rng(seed)
    popular = rng.permutation(V)
    while True:
        sharpness = rng.gamma(2.0, 1.2, (T, 1))
        logits = -np.log1p(np.arange(K)) * sharpness - rng.gumbel(0, 0.3, (T, K)).cumsum(1).clip(0) * 0.05
        logits = -np.sort(-logits, axis=1)
        tail = rng.uniform(-9, -1, T)
        kept = logits - np.log(np.exp(logits).sum(1, keepdims=True)) + np.log1p(-np.exp(tail))[:, None]
        ids = popular[(rng.zipf(1.2, (T, K * 3)) - 1) % V]
        ids = np.stack([_distinct(row, rng) for row in ids]).astype(np.int32)
        completion = ids[:, 0]
        yield {
            "completion_ids": completion,
            "behaviour_logprobs": kept[:, 0] - rng.random(T).astype(np.float32),
            "behaviour_entropy": rng.random(T) * 3,
            "teacher_logprobs": kept[:, 0],
            "teacher_entropy": rng.random(T) * 3,
            "log_tail_mass": tail,
            "top1_id": completion,
            "top1_logprob": kept[:, 0],
            "signal": cache.TopK(ids, kept.astype(np.float32), tail.astype(np.float32)),
        }


def _distinct(row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    found = np.unique(row)
    rng.shuffle(found)
    if len(found) < K:
        found = np.unique(np.concatenate([found, rng.choice(V, 2 * K, replace=False)]))[: 2 * K]
        rng.shuffle(found)
    return found[:K]


def write(root: Path, num_bytes: float) -> None:
    """Commits units until the cache has `num_bytes`; goes on where an earlier call stopped.

    The rows of a unit differ; units repeat 4,096 distributions under new row ids.
    """
    source = rows(0)
    distinct = [next(source) for _ in range(32 * UNIT)]
    with cache.Writer(root, cache.Fingerprint(MUST_MATCH)) as writer:
        written = cache.open(root).summary()["bytes"]
        unit = len(writer.committed_ids) // UNIT
        while written < num_bytes:
            for i in range(UNIT):
                number = unit * UNIT + i
                writer.append(
                    cache.Record(
                        row_id=hashlib.sha256(str(number).encode()).hexdigest()[:32],
                        prompt_id=f"p{number // 4}",
                        occurrence=0,
                        sample_index=number % 4,
                        refresh_index=0,
                        run_id="bench",
                        policy_step=0,
                        policy_hash="0" * 16,
                        finish_reason="length",
                        prompt_text="How much is it?",
                        completion_text="word " * (T // 2),
                        prompt_ids=np.arange(64, dtype=np.int32),
                        **distinct[number % len(distinct)],
                    )
                )
            written += writer.commit(f"g0000-{unit:06d}").num_bytes
            unit += 1


def measure_open(root: Path) -> dict[str, float]:
    """Seconds to open the cache, and to summarise it."""
    start = time.perf_counter()
    snapshot = cache.open(root)
    opened = time.perf_counter()
    snapshot.summary()
    return {"open_seconds": opened - start, "summary_seconds": time.perf_counter() - opened}


def measure_stream(root: Path) -> dict[str, float]:
    """One epoch of `cache.stream`: rates, and the most memory that the process held while it ran."""
    snapshot = cache.open(root)
    before = _memory()
    peak, done = dict(before), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for name, value in _memory().items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    num_rows = sum(1 for _ in cache.stream(snapshot, seed=0, epoch=0))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size = sum(record.shard_bytes for record in snapshot.commit_records())
    return {
        "rows": num_rows,
        "tokens_per_second": num_rows * T / seconds,
        "megabytes_per_second": size / seconds / 1e6,
        "anonymous_mib_before": before["RssAnon"],
        "anonymous_mib_peak": peak["RssAnon"],
    }


def _memory() -> dict[str, float]:
    """Resident memory in MiB, by kind, of this process (Linux)."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if line[0] in ("RssAnon:", "RssFile:")}


def in_a_process(name: str, *arguments: str) -> dict[str, float]:
    """The figures of one `measure_` function in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, *arguments]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return found


def import_seconds() -> float:
    code = (
        "import sys, time; start = time.perf_counter(); import cache; assert 'torch' not in sys.modules;"
        " print(time.perf_counter() - start)"
    )
    runs = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(5)
    ]
    return sorted(runs)[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0], help="sizes, 10^9 bytes")
    parser.add_argument("--folder", type=Path, default=Path("runs/cache_reading"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, root = options.measure
        print(json.dumps({"open": measure_open, "stream": measure_stream}[name](Path(root))))
        return
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "import_seconds": import_seconds(),
        "caches": {},
    }
    for gigabytes in options.gigabytes:
        root = options.folder / f"{gigabytes:g}GB"
        start = time.perf_counter()
        write(root, gigabytes * 1e9)
        print(f"{root} stands after {time.perf_counter() - start:.0f} s", file=sys.stderr)
        summary = cache.open(root).summary()
        kept = {
            name: summary[name] for name in ("bytes", "rows", "shards", "scored_tokens", "bytes_per_token")
        }
        found = kept | in_a_process("open", str(root)) | in_a_process("stream", str(root))
        results["caches"][f"{gigabytes:g} GB"] = found
        print(json.dumps(found))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cache_reading.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
