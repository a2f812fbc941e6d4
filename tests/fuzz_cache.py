"""Fuzz caches from a seed: for any bytes, a reader returns valid rows or fails with one sentence.

    python -m tests.fuzz_cache --minutes 60 --seed 1     # prints the seed and the number of each failing case

Each case changes one file of a small cache, usually with matching digests (an attacker can do this, an
accident cannot), then opens, summarises, streams, shows and verifies it in its own process. The process must
end with success or a CacheError within `SECONDS` and `MEGABYTES`, and every row returned must satisfy the
format's invariants.
"""

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc

import cache
from cache.__main__ import main as command
from cache.codec import CODEC_VERSION
from cache.schema import MASS_TOLERANCE
from tests.support.cache_samples import KINDS, VOCAB, assert_same, write

SECONDS, MEGABYTES = 10, 1_000
NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 10**400, 0.5, 1e308, True)
ODD: tuple[Any, ...] = (
    None,
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "a\x1b[2J\u202e",
    [],
    {},
    [[]],
    {"a": {}},
    [0] * 1000,
    "9" * 5000,
    *NUMBERS,
)
RAW = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"[" * 100_000,
    b'{"a":' * 2_000,
    b'"\\ud800"',
    b"\xff",
    b"\xed\xa0\x80",
    b"",
)


def canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def reseal(path: Path, body: dict[str, Any]) -> None:
    body.pop("sha256", None)
    path.write_bytes(canonical({**body, "sha256": hashlib.sha256(canonical(body)).hexdigest()}) + b"\n")


def body_of(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(path.read_bytes())
    return body


def the_record(root: Path) -> Path:
    return next(iter(sorted((root / "commits").glob("*.json"))))


def mutate_json(body: Any, rng: random.Random) -> Any:
    """`body` with one value anywhere in it replaced, duplicated or removed."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, inner in list(items):
            places.append((value, key))
            walk(inner)

    walk(body)
    place, key = rng.choice(places)
    what = rng.randrange(4)
    if what == 0:
        del place[key]
    elif what == 1 and isinstance(place, list):
        place.append(place[key])
    elif what == 2 and type(place[key]) is int:
        place[key] += rng.choice((-1, 1, 2**31, 2**40))
    else:
        place[key] = rng.choice(ODD)
    return body


def flip(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """Change, cut, duplicate or insert some bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(min(len(changed), end or len(changed)) or 1)
        what = rng.randrange(8)
        if what < 5 and at < len(changed):
            changed[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif what == 5:
            changed[at : at + 8] = struct.pack("<q", rng.choice((-1, 2**31 - 1, 2**34, 2**60, -(2**63))))
        elif what == 6:
            del changed[at : at + rng.randrange(1, 40)]
        else:
            changed[at:at] = changed[at : at + rng.randrange(1, 40)]
    return bytes(changed)


def put_message(root: Path, changed: bytes) -> None:
    """Replace the first record batch's message, and update offsets and digests."""
    path = the_record(root)
    body = body_of(path)
    shard, entry = root / body["shard"], body["batches"][0]
    data = shard.read_bytes()
    data = data[: entry["offset"]] + changed + data[entry["offset"] + entry["num_bytes"] :]
    grown = len(changed) - entry["num_bytes"]
    entry |= {"num_bytes": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
    for other in body["batches"][1:]:
        other["offset"] += grown
    shard.write_bytes(data)
    reseal(path, body | {"shard_bytes": len(data), "shard_sha256": hashlib.sha256(data).hexdigest()})


def get_message(root: Path) -> bytes:
    body = body_of(the_record(root))
    entry = body["batches"][0]
    return (root / body["shard"]).read_bytes()[entry["offset"] : entry["offset"] + entry["num_bytes"]]


def fuzz_message(root: Path, rng: random.Random) -> None:
    data = get_message(root)
    metadata = 8 + struct.unpack_from("<i", data, 4)[0]
    put_message(root, flip(data, rng, metadata if rng.random() < 0.5 else None))


def fuzz_columns(root: Path, rng: random.Random) -> None:
    """Fuzz an uncompressed batch, so that changes reach offsets, validity and values directly."""
    data = _message_of(_read_batch(root), None)
    start = 8 + struct.unpack_from("<i", data, 4)[0]
    body = flip(data[start:], rng)[: len(data) - start]
    put_message(root, data[:start] + body.ljust(len(data) - start, b"\xff"))


def fuzz_signal(root: Path, rng: random.Random) -> None:
    batch = _read_batch(root)
    position = batch.schema.get_field_index("signal")
    values = batch.column(position).to_pylist()
    row = rng.randrange(len(values))
    old = values[row] or b"\2\1\0\0" + bytes(12)
    values[row] = rng.choice((lambda: flip(old, rng), lambda: flip(old, rng, 16), lambda: bomb(rng)))()
    put_batch(
        root, batch.set_column(position, batch.schema.field(position), pa.array(values, pa.large_binary()))
    )


def bomb(rng: random.Random) -> bytes:
    """A few bytes that declare, and where possible unpack to, a huge size."""
    size = rng.choice((1 << 20, 1 << 28, 1 << 33))
    block = struct.pack("<I", 1 << 1 | (1 << 17) << 3)[:3] + b"\0"
    frame = (
        b"\x28\xb5\x2f\xfd"
        + bytes([0b11000000, 0x38])
        + struct.pack("<Q", size)
        + block * min(size >> 17, 20_000)
    )
    header = struct.pack(
        "<BBBxIIf",
        CODEC_VERSION,
        rng.choice((1, 2, 3)),
        rng.choice((0, 1, 2, 8, 31)),
        *rng.choices((1, 2, 5, 7, VOCAB, 2**20, 2**31, 2**32 - 1), k=2),
        1.0,
    )
    return header + (struct.pack("<I", len(frame)) + frame) * 4


def fuzz_record(root: Path, rng: random.Random) -> None:
    path = the_record(root)
    reseal(path, mutate_json(body_of(path), rng))


def fuzz_fingerprint(root: Path, rng: random.Random) -> None:
    """Fuzz the fingerprint; half of the time, records get its new digest."""
    path = root / "fingerprint.json"
    body = mutate_json(body_of(path), rng)
    reseal(path, body)
    if rng.random() < 0.5 and isinstance(body.get("must_match"), dict):
        digest = hashlib.sha256(canonical(body["must_match"])).hexdigest()
        reseal(the_record(root), body_of(the_record(root)) | {"fingerprint": digest})


def fuzz_head(root: Path, rng: random.Random) -> None:
    """Fuzz the head's bytes, and update head.json and all records; without a head, fuzz the record."""
    if not (root / "head.json").exists():
        fuzz_record(root, rng)
        return
    if rng.random() < 0.3:
        reseal(root / "head.json", mutate_json(body_of(root / "head.json"), rng))
        return
    old = root / body_of(root / "head.json")["file"]
    data = flip(old.read_bytes(), rng, 200)
    digest = hashlib.sha256(data).hexdigest()
    (root / "heads" / f"{digest}.safetensors").write_bytes(data)
    reseal(root / "head.json", {"file": f"heads/{digest}.safetensors", "file_sha256": digest})
    for path in (root / "commits").glob("*.json"):
        reseal(path, body_of(path) | {"head_sha256": digest})


def fuzz_raw(root: Path, rng: random.Random) -> None:
    """Fuzz any file without updating digests; JSON files may get text that no writer produces."""
    path = rng.choice(sorted(p for p in root.rglob("*") if p.is_file()))
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.5:
        at = rng.randrange(len(data))
        path.write_bytes(rng.choice((RAW[rng.randrange(len(RAW))], data[:at] + rng.choice(RAW) + data[at:])))
    else:
        path.write_bytes(flip(data, rng))


def fuzz_names(root: Path, rng: random.Random) -> None:
    """Put links, pipes, folders and oddly named files in place of cache files, or next to them."""
    path = rng.choice(sorted(p for p in root.rglob("*") if p.is_file()))
    outside = root.parent / "outside"
    outside.mkdir()
    shutil.copy(path, outside / path.name)
    what = rng.randrange(6)
    if what == 0:
        path.unlink()
        path.symlink_to(rng.choice((outside / path.name, Path("/etc/passwd"), Path("/dev/zero"), path)))
    elif what == 1:
        path.unlink()
        os.mkfifo(path)
    elif what == 2:
        path.unlink()
        path.mkdir()
    elif what == 3 and path.parent != root:
        shutil.move(path.parent, outside / "folder")
        path.parent.symlink_to(outside / "folder")
    else:
        odd = rng.choice(
            ("x\n.json", "\x1b[2J.json", "..json", "a\\b.json", "\u202ex.json", "y" * 200 + ".json")
        )
        shutil.copy(path, path.parent / odd)


def _read_batch(root: Path) -> pa.RecordBatch:
    data = (root / body_of(the_record(root))["shard"]).read_bytes()
    return ipc.open_file(pa.BufferReader(data)).get_batch(0)


def put_batch(root: Path, batch: pa.RecordBatch) -> None:
    put_message(root, _message_of(batch, pa.Codec("zstd", compression_level=3)))


def _message_of(batch: pa.RecordBatch, compression: pa.Codec | None) -> bytes:
    sink = pa.BufferOutputStream()
    options = ipc.IpcWriteOptions(compression=compression, use_threads=False)
    with ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    start = 8 + struct.unpack_from("<i", data, 4)[0]  # after the schema
    return data[start:-8]


FUZZERS: tuple[Callable[[Path, random.Random], None], ...] = (
    fuzz_message,
    fuzz_columns,
    fuzz_signal,
    fuzz_record,
    fuzz_record,
    fuzz_fingerprint,
    fuzz_head,
    fuzz_raw,
    fuzz_names,
)


def use(root: Path) -> None:
    """Use a cache as programs and people do, and check the rows returned."""
    try:
        snapshot = cache.open(root)
        snapshot.summary()
        for row in cache.stream(snapshot, seed=0, epoch=0):
            check_row(row, snapshot.fingerprint.rules.vocab_size)
        snapshot.head()
        for together, alone in zip(snapshot.take(range(len(snapshot))), snapshot, strict=True):
            assert_same(together, alone)
    except cache.CacheError as error:
        if "\n" in str(error):
            raise AssertionError("more than a line") from error
    for words in (["summary"], ["show", "--longest", "3", "--tokens"], ["verify", "--repair"], ["view"]):
        assert command([*words, str(root)]) in (0, 1, 2)


def check_row(row: cache.Record, vocab_size: int) -> None:
    T = len(row.completion_ids)
    for ids in (row.prompt_ids, row.completion_ids):
        assert len(ids)
        assert 0 <= ids.min() <= ids.max() < vocab_size
    for values in (row.behaviour_logprobs, row.behaviour_entropy, row.teacher_logprobs, row.teacher_entropy):
        assert values is None or (len(values) == T and abs(values).max() < float("inf"))
    if isinstance(row.signal, cache.TopK):
        assert len(row.signal.ids) == len(row.signal.log_tail_mass) == T
        assert row.signal.ids.max() < vocab_size
        assert row.signal.logprobs.max() <= MASS_TOLERANCE
    elif row.signal is not None:
        states = row.signal.states if isinstance(row.signal, cache.Hidden) else row.signal.logits
        assert len(states) == T


def run_case(seed: int, bases: Path, work: Path) -> str | None:
    """Run case `seed` in a child process that has ended on return; what went wrong, or None."""
    rng = random.Random(seed)
    fuzz = rng.choice(FUZZERS)
    root = work / "cache"
    shutil.copytree(bases / rng.choice(KINDS), root)
    before = tree(work.parent / "victim")
    pid = os.fork()
    if pid == 0:
        _in_child(root, fuzz, rng, work)
    _, status, usage = os.wait4(pid, 0)
    code, problem = os.waitstatus_to_exitcode(status), None
    if code:
        problem = f"exit {code}: {(work / 'log').read_text(errors='replace')[-1500:]}"
    elif usage.ru_maxrss // 1024 > MEGABYTES:
        problem = f"{usage.ru_maxrss // 1024} MB"
    elif tree(work.parent / "victim") != before:
        problem = "a file outside the cache was changed"
    return None if problem is None else f"case {seed} ({fuzz.__name__}): {problem}"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _in_child(
    root: Path, fuzz: Callable[[Path, random.Random], None], rng: random.Random, work: Path
) -> None:
    code = 1
    try:
        log = os.open(work / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(fd, "w", closefd=False), "utf-8") for fd in (1, 2)
        )
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(SECONDS)
        warnings.simplefilter("error")
        fuzz(root, rng)
        use(root)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def make_bases(folder: Path) -> None:
    for kind in KINDS:
        write(folder / kind, range(6), kind)


def campaign(seeds: Iterable[int], seconds: float) -> tuple[int, list[str]]:
    """Number of cases run, and a description of each failure."""
    with tempfile.TemporaryDirectory(prefix="fuzz-cache-") as folder:
        make_bases(Path(folder) / "bases")
        (Path(folder) / "victim").mkdir()
        (Path(folder) / "victim" / "precious.txt").write_text("the only copy")
        return each_case(
            seeds, seconds, Path(folder), lambda seed, work: run_case(seed, Path(folder) / "bases", work)
        )


def each_case(
    seeds: Iterable[int], seconds: float, folder: Path, run: Callable[[int, Path], str | None]
) -> tuple[int, list[str]]:
    """Run one case per seed in separate folders until time is up; returns their number and the failures."""
    end, count, problems = time.monotonic() + seconds, 0, []
    for seed in seeds:
        if time.monotonic() > end:
            break
        work = folder / f"case-{seed}"
        work.mkdir()
        if problem := run(seed, work):
            problems.append(problem)
            print(problem, flush=True)
        shutil.rmtree(work)
        count += 1
    return count, problems


def run_command(description: str, campaign: Callable[[Iterable[int], float], tuple[int, list[str]]]) -> int:
    """Command line of a fuzzer; returns 1 if a case failed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    count, problems = campaign(range(options.seed, sys.maxsize), options.minutes * 60)
    print(f"{count} cases from {options.seed} on, {len(problems)} went wrong")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(run_command(__doc__, campaign))
