"""Caches that people made to do harm, or that other machines spoil: nothing outside is touched, nothing sound
is lost.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import struct
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import cache
from cache import codec, commit, message, planes
from cache.__main__ import main
from cache.heads import store_head
from cache.plain import plain
from cache.store import STALE_SECONDS, LocalStore, ObjectStore, Store, open_store
from cache.upkeep import merge, prune
from tests import fuzz_cache
from tests.fuzz_cache import body_of, reseal, the_record
from tests.support.cache_samples import KEPT, VOCAB, files, fingerprint, head, record, row_id, write
from tests.support.thinning import leading

PRUNES = (["--policy", "0000"], ["--max_bytes", "100"], ["--max_age", "1", "--at_step", "900"])
NAMES = (
    "../../precious.txt",
    "shards/../../precious.txt",
    "/{outside}",
    "fingerprint.json",
    "shards",
    "",
    ".",
    "~/x",
    "shards/..\\x-0123456789ab-01234567.arrow",
    "shards/a\n-0123456789ab-01234567.arrow",
    "commits/x-0123456789ab-01234567.arrow",
    "shards/.x-0123456789ab-01234567.arrow",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two units of three rows, and beside the cache a file that is nobody's business."""
    (tmp_path / "precious.txt").write_text("the only copy")
    for unit in range(2):
        write(tmp_path / "runs" / "cache", range(3 * unit, 3 * unit + 3), unit=f"g0000-0000{unit}")
    return tmp_path / "runs" / "cache"


def change(root: Path, **changes: object) -> None:
    reseal(the_record(root), body_of(the_record(root)) | changes)


@pytest.mark.parametrize("name", NAMES)
def test_a_record_that_names_a_file_elsewhere_costs_nothing_but_its_own_rows(root, tmp_path, capsys, name):
    change(root, shard=name.format(outside=tmp_path / "precious.txt"))
    before = fuzz_cache.tree(tmp_path)
    for words in PRUNES:
        assert main(["prune", *words, str(root)]) == 2
    assert main(["summary", str(root)]) == 2
    assert fuzz_cache.tree(tmp_path) == before
    assert main(["verify", "--repair", str(root)]) == 0
    after = fuzz_cache.tree(tmp_path)
    gone = [Path(path) for path in before.keys() - after.keys()]
    assert sorted(path.parent.name for path in gone) == ["commits", "shards"]  # both moved aside
    assert cache.open(root).row_ids == sorted(row_id(n) for n in range(3, 6))
    assert "Traceback" not in capsys.readouterr().err


def test_a_store_reads_and_writes_nothing_outside_its_root(root, tmp_path):
    store = open_store(root)
    for name in (
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a/b/c",
        "a//b",
        "a\0b",
        "a\\b",
        ".",
        "commits/..",
        "\x1b",
    ):
        for call in (
            store.read,
            store.size,
            store.hash,
            store.remove,
            store.local_copy,
            store.draft,
            store.set_aside,
        ):
            with pytest.raises(cache.StoreError, match="cannot be the name of a cache's file"):
                call(name)
    (root / "link").symlink_to(tmp_path / "precious.txt")
    (root / "folder").symlink_to(tmp_path)
    for look, name in itertools.product(
        (store.read, store.size, store.hash), ("link", "folder/precious.txt")
    ):
        with pytest.raises(cache.StoreError, match="outside the cache; nothing was changed"):
            look(name)
    for write_ in (
        lambda: store.create("folder/new", b""),
        lambda: store.draft("folder"),
        lambda: store.remove("folder/precious.txt"),
    ):
        with pytest.raises(cache.StoreError, match="outside the cache"):
            write_()
    assert files(tmp_path) == ["precious.txt", "runs"]
    keys = ObjectStore("memory://bucket/cache")
    with pytest.raises(cache.StoreError, match="cannot be the name"):
        keys.read("../other/key")


def test_a_cache_may_lie_behind_a_link_and_link_within_itself(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    shard = next((root / "shards").iterdir())
    shard.rename(root / "elsewhere")
    shard.symlink_to(root / "elsewhere")
    assert len(list(cache.open(tmp_path / "link"))) == 6


@pytest.mark.parametrize("what", ["pipe", "folder", "large"])
def test_what_is_no_file_of_a_cache_is_named_at_once(root, monkeypatch, what):
    path = the_record(root)
    if what == "large":
        monkeypatch.setattr("cache.store.MOST_BYTES_READ", 500)
    else:
        path.unlink()
        os.mkfifo(path) if what == "pipe" else path.mkdir()
    with pytest.raises(
        cache.CacheError, match="expected at most 500" if what == "large" else "not a regular file"
    ):
        cache.open(root)


def test_a_record_under_the_name_of_another_one_is_refused(root):
    """Removing the rows of one would remove the record of the other."""
    first, second = sorted((root / "commits").iterdir())
    first.write_bytes(second.read_bytes())
    with pytest.raises(cache.CacheError, match=f"{first.name} should be named {second.name}; rename it"):
        prune(root, policies=["0000"])
    assert [finding.record for finding in cache.verify(root)] == [None]


def test_a_shard_that_two_records_name_stays_while_one_of_them_does(root):
    first, second = (
        commit.read_record(open_store(root), path.name) for path in sorted((root / "commits").iterdir())
    )
    copied = dataclasses.replace(first, unit="g0000-00009")
    assert commit.write_record(open_store(root), copied)
    prune(root, max_bytes=cache.open(root).summary()["bytes"] - 1)
    assert cache.open(root)[0].row_id
    assert len(list(cache.open(root))) == 6
    assert (root / second.shard).exists()


def test_merge_writes_over_no_shard_of_the_target(root, tmp_path):
    source = tmp_path / "source"
    write(source, range(6, 9))
    own = body_of(the_record(root))["shard"]
    old = body_of(the_record(source))["shard"]
    (source / old).rename(source / own)
    change(source, shard=own)
    before = (root / own).read_bytes()
    with pytest.raises(cache.CacheError, match="it was not overwritten"):
        merge(root, [source])
    assert (root / own).read_bytes() == before


def test_somebody_elses_files_in_the_folders_of_a_cache_stay(root):
    mine = [
        root / "shards" / "notes.txt",
        root / "shards" / "backup.arrow",
        root / ".tmp-mine",
        root / "commits" / ".tmp-x",
    ]
    for path in mine:
        path.write_text("mine")
        os.utime(path, (0, 0))
    write(root, range(6, 7), unit="g0000-00009")
    assert all(path.exists() for path in mine)


# --- heads ---
@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    write(tmp_path / "cache", range(3), "hidden")
    return tmp_path / "cache"


def test_rows_of_another_head_are_not_read_nor_added_to(hidden):
    own = (hidden / commit.HEAD).read_bytes()
    (hidden / commit.HEAD).unlink()
    store_head(open_store(hidden), head(1), [])
    kept = files(hidden / commit.HEADS)
    for use in (
        lambda: cache.open(hidden),
        lambda: cache.Writer(hidden, fingerprint("hidden"), head=head()),
        lambda: cache.Writer(hidden, fingerprint("hidden"), head=head(1)),
        lambda: cache.Writer(hidden, fingerprint("hidden")),
    ):
        with pytest.raises(cache.CacheError, match=r"head"):
            use()
    assert files(hidden / commit.HEADS) == kept
    assert [finding.record for finding in cache.verify(hidden)] == [None]
    (hidden / commit.HEAD).unlink()
    with pytest.raises(
        cache.CacheError,
        match=r"head\.json: the rows of shards/.* with teacher head .*, but the cache has no teacher head",
    ):
        cache.open(hidden)
    (hidden / commit.HEAD).write_bytes(own)
    assert len(cache.open(hidden)) == 3


def test_a_head_json_that_names_another_file_is_refused(hidden):
    reseal(hidden / commit.HEAD, body_of(hidden / commit.HEAD) | {"file_sha256": "../../x"})
    with pytest.raises(cache.CacheError, match=r"head\.json does not name a head of this cache"):
        cache.open(hidden)


@pytest.mark.parametrize("weight", [1e38, math.nan])
def test_a_head_of_huge_numbers_is_a_sentence_without_warnings(weight, recwarn):
    foreign = cache.TeacherHead(np.full((9, 4), weight, np.float32), "float32")
    with pytest.raises(cache.CacheError, match=r"logits that are not finite; .* write the cache again"):
        foreign.logits(np.full((2, 4), 1e38, np.float32), slice(0, 9))
    assert [str(warning.message) for warning in recwarn] == []


# --- bytes ---
@pytest.mark.parametrize("cases", leading(1, [25, 150]))
def test_hostile_caches_give_sound_rows_or_one_sentence(cases):
    count, problems = fuzz_cache.campaign(range(cases), seconds=60)
    assert problems == []
    assert count > 10


@pytest.mark.slow
def test_thousands_of_hostile_caches_give_sound_rows_or_one_sentence():
    seconds = 60 * float(os.environ.get("FUZZ_MINUTES", "5"))
    count, problems = fuzz_cache.campaign(itertools.count(random.SystemRandom().randrange(2**31)), seconds)
    assert problems == []
    assert count > 100


def test_the_message_that_arrow_wrote_is_within_its_bounds_and_one_that_declares_gigabytes_is_not(root):
    data = bytearray(fuzz_cache.get_message(root))
    message.check_message(memoryview(data))
    body = 8 + struct.unpack_from("<i", data, 4)[0]
    struct.pack_into("<q", data, body, 2**34)  # what the first buffer says that it unpacks to
    with pytest.raises(cache.CacheError, match=r"declares that it unpacks to 17,1\d\d,\d\d\d,\d\d\d"):
        message.check_message(memoryview(data))
    fuzz_cache.put_message(root, bytes(data))
    with pytest.raises(cache.CacheError, match="unpacks to"):
        list(cache.open(root))


def test_a_signal_is_refused_before_it_is_unpacked_unless_it_is_as_row_and_fingerprint_say(monkeypatch):
    rules = fingerprint().rules
    packed = codec.encode(record(1, num_tokens=4).signal)
    assert codec.decode(packed, 4, rules).ids.shape == (4, KEPT)
    monkeypatch.setattr(planes.Source, "read", lambda *_: pytest.fail("it was unpacked"))
    header = codec.HEADER
    for T, width, kind, temperature in (
        (5, KEPT, 1, 1.0),
        (4, KEPT + 1, 1, 1.0),
        (4, 0, 1, 1.0),
        (4, KEPT, 2, 1.0),
        (4, KEPT, 3, 1.0),
        (4, KEPT, 1, 0.5),
        (2**32 - 1, KEPT, 1, 1.0),
    ):
        changed = header.pack(2, kind, 9, T, width, temperature) + packed[header.size :]
        with pytest.raises(cache.CacheError, match=r"the packed signal cannot be decoded|more than any real"):
            codec.decode(changed, 4, rules)
    full = dataclasses.replace(fingerprint("full").rules, vocab_size=VOCAB)
    with pytest.raises(cache.CacheError, match=f"it has {VOCAB - 1} numbers a token, expected {VOCAB}"):
        codec.decode(header.pack(2, 3, 0, 4, VOCAB - 1, 0.0), 4, full)


def test_a_writer_refuses_what_no_reader_would_unpack():
    zeros = cache.Full(np.zeros((300, 2**17), np.float16), "float16")
    with pytest.raises(cache.CacheError, match="more than any real signal of that size"):
        codec.encode(zeros)


@pytest.mark.parametrize("column", ["row_id", "prompt_id", "run_id", "policy_step", "completion_ids"])
def test_a_batch_that_is_not_what_its_record_says_is_refused(root, column):
    batch = fuzz_cache._read_batch(root)
    position = batch.schema.get_field_index(column)
    values = batch.column(position).to_pylist()
    changed = pa.array(values[1:] + values[:1], batch.column(position).type)
    if column in ("run_id", "policy_step"):
        changed = pa.array(
            [value + value for value in values[:1]] * 3 if column == "run_id" else [7, 7, 7], changed.type
        )
    fuzz_cache.put_batch(root, batch.set_column(position, batch.schema.field(position), changed))
    with pytest.raises(cache.CacheError, match=f"column {column}"):
        list(cache.open(root))


# --- machines ---
# and clocks
def test_what_is_read_wrong_once_is_no_damage(root, monkeypatch, capsys):
    shard = body_of(the_record(root))["shard"]
    read, wrong = LocalStore.hash, [1]

    def hash_once_wrong(store: Store, name: str) -> str:
        return "0" * 64 if name == shard and wrong and wrong.pop() else read(store, name)

    monkeypatch.setattr(LocalStore, "hash", hash_once_wrong)
    assert main(["verify", "--repair", str(root)]) == 1
    out = capsys.readouterr().out
    assert "failed to verify once but passed on re-read" in out
    assert "withdrawn" not in out
    assert cache.verify(root) == []
    assert len(cache.open(root)) == 6


def test_repair_moves_aside_and_deletes_nothing(root):
    shard = root / body_of(the_record(root))["shard"]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    record_bytes = the_record(root).read_bytes()
    assert main(["verify", "--repair", str(root)]) == 0
    kept = {path.name[9:]: path.read_bytes() for path in (root / "withdrawn").iterdir()}
    assert sorted(kept.values()) == sorted([data[:-1], record_bytes])
    assert shard.name in kept


@pytest.mark.parametrize("hours", [25, -25])
def test_a_writer_whose_clock_is_wrong_removes_nothing_of_a_writer_at_work(root, monkeypatch, hours):
    draft = open_store(root).draft(commit.SHARDS)
    (root / "shards" / "g0000-00007-0123456789ab-01234567.arrow").write_bytes(
        b"published, its record still to come"
    )
    before = files(root / "shards")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + hours * 3600)
    write(root, range(6, 7), unit="g0000-00009")
    assert set(before) <= set(files(root / "shards"))
    draft.discard()


def test_a_writer_that_slept_for_a_day_between_shard_and_record_commits_nothing(root, monkeypatch):
    write_record = commit.write_record

    def remove_first(store: Store, made: commit.CommitRecord) -> bool:
        os.utime(root / made.shard, (0, time.time() - STALE_SECONDS - 60))
        with cache.Writer(root, fingerprint()):
            pass
        return write_record(store, made)

    monkeypatch.setattr(commit, "write_record", remove_first)
    with pytest.raises(cache.CacheError, match="was removed before its rows could be committed"):
        write(root, range(6, 9), unit="g0000-00009")
    assert (cache.verify(root), len(cache.open(root))) == ([], 6)


# --- text ---
HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J \x9b31m\x85 \u202egnirts\u202c \u2066x\u2069\u200f\u061c"
    " \x7f\x00\x08\x0b\rback\u2028\ufeff"
)


def steering(text: str) -> list[str]:
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"]


def test_plain_text_stays_and_what_steers_a_terminal_is_shown_as_its_escape():
    text = "café, 你好, नमस्ते, می\u200cخواهم, 👩\u200d👩\u200d👧 ünï"
    assert plain(text) == text
    assert plain("a\x1b[2Jb\x9b\u202e\ud800\n") == r"a\x1b[2Jb\x9b\u202e\ud800\n"
    assert str(cache.CacheError("a\x1bb\nc")) == r"a\x1bb\nc"
    assert len(str(cache.CacheError("x" * 10**6))) < 3_000


def test_no_command_prints_what_a_terminal_obeys(tmp_path, capsys):
    tokens = {str(i): i for i in range(VOCAB // 2)} | {f"{HOSTILE}{i}": i for i in range(VOCAB // 2, VOCAB)}
    model = {"type": "WordLevel", "vocab": tokens, "unk_token": "0"}
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": model} | dict.fromkeys(parts))
    own = {"prompt_text": HOSTILE, "completion_text": HOSTILE, "run_id": HOSTILE, "policy_hash": HOSTILE}
    with cache.Writer(tmp_path, fingerprint(teacher=HOSTILE), tokenizer_json=text) as writer:
        for number in range(3):
            writer.append(record(number, prompt_id=f"{HOSTILE}{number}", **own))
        writer.commit("u")
    other = cache.Fingerprint(
        fingerprint(teacher=HOSTILE).must_match, {"student": "x\x1b", "d\x1bx": HOSTILE}
    )
    with cache.Writer(tmp_path, other) as writer:
        assert not any(map(steering, writer.differences))
    commands = [
        ["summary"],
        ["summary", "--json"],
        ["view"],
        ["show"],
        ["show", "--longest", "3", "--tokens"],
        ["verify"],
        ["show", "--prompt", HOSTILE],
        ["show", "--prompt", "\x1bz"],
        ["prune", "--policy", "\x1bz"],
        ["prune", "--max_age", "1", "--at_step", "5", "--run_id", "\x1bz"],
    ]
    for command in commands:
        main([*command, str(tmp_path)])
        captured = capsys.readouterr()
        assert steering(captured.out + captured.err) == [], command
        assert captured.out + captured.err
    assert (
        json.loads(_printed(capsys, ["summary", "--json", str(tmp_path)]))["policies"][0]["run_id"] == HOSTILE
    )


def _printed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    main(arguments)
    return capsys.readouterr().out


# --- scale ---
@contextlib.contextmanager
def counted(store: type[Store], method: str) -> Iterator[list[tuple[object, ...]]]:
    calls: list[tuple[object, ...]] = []
    original = getattr(store, method)
    setattr(store, method, lambda *args: (calls.append(args[1:]), original(*args))[1])
    yield calls
    setattr(store, method, original)


def test_a_commit_looks_at_names_once_and_reads_no_record_twice(root):
    with cache.Writer(root, fingerprint()) as writer:
        writer.append(record(6))
        names, sizes, reads = (counted(LocalStore, method) for method in ("_names", "sizes", "read"))
        with names as listed, sizes as measured, reads as read:
            writer.commit("g0000-00009")
    assert (listed, measured, read) == ([(commit.COMMITS,)], [], [])


def test_where_listing_is_slow_a_writer_looks_seldom_and_a_row_that_is_there_twice_is_read_once(
    root, monkeypatch
):
    monkeypatch.setattr("cache.writer._QUICK_SECONDS", -1.0)
    monkeypatch.setattr("cache.writer._SHARE", 1e9)
    with cache.Writer(root, fingerprint()) as writer:
        for number in range(6, 9):
            writer.append(record(number))
            with counted(LocalStore, "_names") as listed:
                writer.commit(f"g0001-{number:05}")
            assert listed == []
        write(root, range(9, 10), unit="g0002-00000")
        writer.append(record(9))
        assert writer.commit("g0002-00001").rows == 1
    snapshot = cache.open(root)
    assert (len(snapshot), snapshot.summary()["duplicate_rows"]) == (10, 1)
