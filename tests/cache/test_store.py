"""The cache on an object store: an S3 server on the loopback, real requests, conditional puts, no rename."""

import json
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cache
from cache import commit
from cache.__main__ import main
from cache.store import STALE_SECONDS, LocalStore, ObjectStore, open_store
from cache.verify import withdraw
from tests.support.cache_samples import KINDS, assert_same, fingerprint, head, record, row_id, write
from tests.support.cache_writers import UNITS, assert_holds, drive, write_missing
from tests.support.helpers import assert_same_weights, weights_in
from tests.support.thinning import leading
from tests.support.tiny_runs import train

SETTINGS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of an S3 server with one bucket; AWS clients of this process and its children use it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SETTINGS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def root(server: str, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/caches/{abs(hash(request.node.name)):x}"


def keys(root: str) -> list[str]:
    """All objects of a cache, relative to it."""
    store = open_store(root)
    return [f"{f}/{n}" for f in (commit.SHARDS, commit.COMMITS, commit.HEADS) for n in store.sizes(f)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back_from_an_object_store(root: str, kind: str) -> None:
    for unit in range(2):
        write(root, range(4 * unit, 4 * unit + 4), kind, f"g0000-{unit:05d}")
    snapshot = cache.open(root + "/")
    assert snapshot.root == root
    for number in range(8):
        assert_same(snapshot[snapshot.position(row_id(number))], record(number, kind))
    assert {r.row_id for r in cache.stream(snapshot, seed=0, epoch=0)} == set(snapshot.row_ids)
    assert snapshot.verify() == []
    assert (snapshot.head() is None) == (kind != "hidden")
    if kind == "hidden":
        assert (snapshot.head().weight == head().weight).all()
    summary = snapshot.summary()
    assert summary["bytes"] == sum(open_store(root).sizes(commit.SHARDS).values()) + sum(
        sum(open_store(root).sizes(folder).values()) for folder in (commit.COMMITS, commit.HEADS)
    ) + sum(size for name, size in open_store(root).sizes("").items() if name.endswith(".json"))
    assert snapshot.shard_paths()[0].startswith(f"{root}/shards/g0000-00000-")


@pytest.mark.thorough
def test_a_crash_at_any_request_leaves_all_of_a_unit_or_nothing(root: str) -> None:
    steps = json.loads(drive("crash", root, "before", "after"))
    assert {step.split("-")[1] for step in steps} == {"_upload", "create", "remove"}
    held = []
    for step in steps:
        place = f"{root}/{step}"
        if cache.exists(place):
            held.append(len(cache.open(place)))
            assert_holds(place, list(range(held[-1])))
        write_missing(place, [range(3), range(3, 6)])
        assert_holds(place, list(range(6)))
    assert set(held) == {0, 3, 6}
    assert held == sorted(held)


@pytest.mark.thorough
def test_kills_at_random_times_lose_and_double_nothing(root: str) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    assert json.loads(drive("kill", root, str(seed), "10"))["kills"] == 10
    assert_holds(root, [n for unit in UNITS for n in unit])
    assert cache.open(root).summary()["duplicate_rows"] == 0


@pytest.mark.parametrize("plan", leading(1, ["same", "different"]))
def test_writers_that_race_lose_and_double_nothing(root: str, plan: str) -> None:
    results = json.loads(drive("race", root, plan))
    assert_holds(root, list(range(30)))
    summary = cache.open(root).summary()
    assert summary["duplicate_rows"] == sum(rows for rows, _ in results) - 30
    assert summary["leftover_files"] == 0
    if plan == "same":
        assert [folder.split("/")[0] for folder in keys(root)] == ["shards"] * 10 + ["commits"] * 10


def test_a_put_that_was_sent_twice_is_not_taken_for_another_writers(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = ObjectStore.create
    monkeypatch.setattr(ObjectStore, "create", lambda *arguments: [create(*arguments) for _ in range(2)][-1])
    monkeypatch.setattr(ObjectStore, "check_create", lambda self: None)
    assert write(root, range(3)).rows == 3
    assert_holds(root, list(range(3)))


def test_damage_is_found_repaired_and_refilled(root: str) -> None:
    write(root, range(3), unit="a")
    write(root, range(3, 6), unit="b")
    store: Any = open_store(root)
    shard = cache.open(root).commit_records()[0].shard
    data = bytearray(store.read(shard))
    data[len(data) // 2] ^= 1
    store._fs.pipe_file(store._key(shard), bytes(data))
    (finding,) = cache.verify(root)
    assert (finding.file, finding.rows) == (shard, (0, 2))
    with pytest.raises(cache.CacheError, match=r"rows 0 to 2"):
        cache.open(root)[cache.open(root).position(row_id(0))]
    assert withdraw(root, [finding])[0] == f"commits/{finding.record}"
    assert len(keys(root)) == 2
    assert_holds(root, [3, 4, 5])
    write(root, range(3), unit="a")
    assert_holds(root, list(range(6)))


def test_a_silent_store_is_no_damage(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network failure says of a shard must never let `verify --repair` withdraw it."""
    write(root, range(3))
    snapshot = cache.open(root)
    store: Any = snapshot.store

    def fail(*arguments: object, **options: object) -> None:
        raise TimeoutError("no answer")

    for name in ("cat_file", "open", "info", "size"):
        monkeypatch.setattr(store._fs, name, fail)
    for act in (
        snapshot.verify,
        lambda: snapshot[0],
        snapshot.head,
        lambda: cache.Writer(snapshot.store, fingerprint()),
    ):
        with pytest.raises(
            cache.StoreError, match=r"cannot be read or written now \(TimeoutError: no answer\); nothing"
        ):
            act()
    monkeypatch.undo()
    assert_holds(root, list(range(3)))


def test_leftovers_are_removed_after_a_day(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, range(3))
    store: Any = open_store(root)
    left = "shards/g9-0123456789ab-01234567.arrow"
    store._fs.pipe_file(store._key(left), b"dead")
    assert cache.open(root).summary()["leftover_bytes"] == 4
    cache.Writer(root, fingerprint())
    assert store.size(left) == 4
    modified = ObjectStore.modified
    monkeypatch.setattr(
        ObjectStore, "modified", lambda self, name: modified(self, name) - 2 * STALE_SECONDS * (name == left)
    )
    cache.Writer(root, fingerprint())
    assert store.size(left) is None
    assert_holds(root, list(range(3)))


def test_a_store_that_overwrites_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    with cache.Writer("memory://sound", fingerprint()) as writer:
        writer.append(record(0))
        writer.commit("g0")
    assert_holds("memory://sound", [0])
    pipe = MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem, "pipe_file", lambda self, path, value, mode="": pipe(self, path, value)
    )
    with pytest.raises(cache.StoreError, match=r"memory://careless: this storage overwrites an object"):
        cache.Writer("memory://careless", fingerprint())


def test_urls_that_nothing_opens_and_places_without_a_cache(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {
        "nowhere://bucket/x": "nowhere://bucket/x cannot be opened (Protocol not known: nowhere)",
        "s3://bucket/nothing": "s3://bucket/nothing holds no cache (no fingerprint.json)",
        "s3://no-bucket/x": "s3://no-bucket/x holds no cache",
    }
    for url, sentence in expected.items():
        assert main(["summary", url]) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(
        cache.CacheError, match=r"The specified bucket does not exist while writing to s3://no-bucket/x"
    ):
        cache.Writer("s3://no-bucket/x", fingerprint())
    assert isinstance(open_store(f"file://{Path.cwd()}"), LocalStore)


@pytest.mark.thorough
def test_both_stages_work_on_an_object_store(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights as with the cache in a folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    local = train(tmp_path / "local", max_steps=4)
    remote = train(tmp_path / "remote", max_steps=4, cache_dir="s3://bucket/runs/cache")
    assert not (remote.folder / "cache").exists()
    assert cache.open("s3://bucket/runs/cache").row_ids == cache.open(local.config.cache_root).row_ids
    assert cache.verify("s3://bucket/runs/cache") == []
    assert_same_weights(weights_in(remote.folder / "student"), weights_in(local.folder / "student"))


def test_a_cache_at_the_root_of_an_archive_is_read_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "cache", range(3), unit="a")
    write(tmp_path / "cache", range(3, 6), unit="b")
    path = shutil.make_archive(str(tmp_path / "sound"), "zip", tmp_path / "cache")
    assert main(["verify", f"zip://::{path}"]) == 0
    assert "is sound: 6 rows" in capsys.readouterr().out
    shard = cache.open(tmp_path / "cache").commit_records()[0].shard
    (tmp_path / "cache" / shard).write_bytes(b"")
    assert (
        len(
            cache.verify(
                f"zip://::{shutil.make_archive(str(tmp_path / 'damaged'), 'zip', tmp_path / 'cache')}"
            )
        )
        == 1
    )


def test_an_archive_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_text("no archive")
    with pytest.raises(
        cache.StoreError, match=r"x\.zip cannot be opened \(File is not a zip file\); check its address"
    ):
        cache.verify(f"zip://::{tmp_path}/x.zip")
