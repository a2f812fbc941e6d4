"""Damage of every kind is found and named, and repair withdraws no more than what is damaged."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import cache
from cache import codec, commit, shard
from cache.__main__ import main
from cache.store import open_store
from cache.verify import Finding, verify, withdraw
from tests.support.cache_samples import assert_same, fingerprint, head, record, row_id, write

NUM_FLIPS = 1_000


@pytest.fixture(params=["topk", "hidden"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine rows in one shard of several record batches."""
    monkeypatch.setattr(shard, "TOKENS_PER_BATCH", 8)
    write(tmp_path, range(9), request.param)
    return tmp_path


def the_record(root: Path) -> commit.CommitRecord:
    (name,) = commit.record_names(open_store(root))
    return commit.read_record(open_store(root), name)


def expected_rows(found: commit.CommitRecord, position: int) -> tuple[int, int] | None:
    """First and last row of the record batch that holds a byte of the shard."""
    first = 0
    for entry in found.batches:
        if entry.offset <= position < entry.offset + entry.num_bytes:
            return first, first + entry.num_rows - 1
        first += entry.num_rows
    return None


def assert_names(findings: list[Finding], found: commit.CommitRecord, rows: tuple[int, int] | None) -> None:
    assert findings, "not found"
    assert {finding.file for finding in findings} == {found.shard}
    assert {finding.record for finding in findings} == {found.name}
    assert all(found.shard in str(finding) for finding in findings)
    if rows is not None:
        assert rows in [finding.rows for finding in findings]
        assert any(f"rows {rows[0]} to {rows[1]} are damaged" in str(finding) for finding in findings)


def test_every_flipped_bit_of_a_shard_is_found_and_its_rows_are_named(root: Path) -> None:
    found = the_record(root)
    assert len(found.batches) >= 2
    path = root / found.shard
    sound = path.read_bytes()
    random = np.random.default_rng(0)
    for position, bit in zip(
        random.integers(0, len(sound), NUM_FLIPS), random.integers(0, 8, NUM_FLIPS), strict=True
    ):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        assert_names(verify(root), found, expected_rows(found, int(position)))
    path.write_bytes(sound)
    assert verify(root) == []


def lengths(found: commit.CommitRecord, size: int) -> Iterator[int]:
    yield from (0, 1, 7, 8, size - 1)
    for entry in found.batches:
        end = entry.offset + entry.num_bytes
        yield from (entry.offset - 1, entry.offset, entry.offset + 1, end - 1, end, end + 1)
    yield from np.random.default_rng(1).integers(0, size, 50).tolist()


def test_every_truncation_of_a_shard_is_found(root: Path) -> None:
    found = the_record(root)
    path = root / found.shard
    sound = path.read_bytes()
    for length in lengths(found, len(sound)):
        path.write_bytes(sound[:length])
        last = found.batches[-1]
        is_cut = length < last.offset + last.num_bytes
        assert_names(verify(root), found, expected_rows(found, last.offset) if is_cut else None)


def test_every_flipped_bit_beside_the_shard_is_found_in_its_file(root: Path) -> None:
    random = np.random.default_rng(2)
    files = {
        commit.FINGERPRINT: commit.FINGERPRINT
    }  # the file that is damaged, and the one that a finding names
    files |= {
        name: name
        for name in (f"{commit.COMMITS}/{the_record(root).name}", commit.HEAD)
        if (root / name).exists()
    }
    files |= {str(path.relative_to(root)): commit.HEAD for path in (root / commit.HEADS).glob("*")}
    for name, named in files.items():
        path = root / name
        sound = path.read_bytes()
        for position, bit in zip(
            random.integers(0, len(sound), 100), random.integers(0, 8, 100), strict=True
        ):
            damaged = bytearray(sound)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            assert named in {finding.file for finding in verify(root)}, (name, position)
        path.write_bytes(sound)


def three_shards(root: Path, kind: str = "topk") -> list[commit.CommitRecord]:
    for index in range(3):
        write(root, range(3 * index, 3 * index + 3), kind, unit=f"g0000-0000{index}")
    return [commit.read_record(open_store(root), name) for name in commit.record_names(open_store(root))]


@pytest.mark.parametrize(
    "harm", ["flip", "cut", "missing shard", "damaged record", "cut record", "misspelt record"]
)
def test_repair_withdraws_just_what_is_damaged_and_stage_one_fills_it_in(tmp_path: Path, harm: str) -> None:
    records = three_shards(tmp_path)
    damaged = next(r for r in records if r.unit == "g0000-00001")
    path = tmp_path / damaged.shard
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    of_record = tmp_path / commit.COMMITS / damaged.name
    text = of_record.read_text()
    harms: dict[str, Callable[[], object]] = {
        "flip": lambda: path.write_bytes(data),
        "cut": lambda: path.write_bytes(data[:100]),
        "missing shard": path.unlink,
        "damaged record": lambda: of_record.write_text("{}"),
        "cut record": lambda: of_record.write_text(text[:100]),
        "misspelt record": lambda: of_record.write_text(text.replace(damaged.shard[-14:], "00000000.arrow")),
    }
    harms[harm]()
    moved = [f"commits/{damaged.name}"] + [damaged.shard] * path.exists()
    assert withdraw(tmp_path, verify(tmp_path)) == moved
    assert verify(tmp_path) == []
    assert cache.open(tmp_path).row_ids == sorted(row_id(n) for n in (0, 1, 2, 6, 7, 8))
    assert not path.exists()
    assert len(list((tmp_path / "withdrawn").iterdir())) == len(moved)
    write(tmp_path, range(3, 6), unit="g0000-00001")
    snapshot = cache.open(tmp_path)
    for number in range(9):
        assert_same(snapshot[snapshot.position(row_id(number))], record(number))


def test_the_command_repairs_and_says_what_it_withdrew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = three_shards(tmp_path)[0]
    (tmp_path / damaged.shard).unlink()
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["verify", "--repair", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"withdrawn: commits/{damaged.name}" in out
    assert "is sound: 6 rows" in out
    assert main(["verify", "--repair", str(tmp_path)]) == 0


def test_repair_leaves_what_withdrawing_rows_does_not_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with cache.Writer(tmp_path, fingerprint("hidden"), head=head()) as writer:
        writer.append(record(0, "hidden"))
        writer.commit("g0000-00000")
    (weights,) = (tmp_path / commit.HEADS).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert main(["verify", "--repair", str(tmp_path)]) == 1
    assert "head" in capsys.readouterr().out
    assert len(commit.record_names(open_store(tmp_path))) == 1


@pytest.mark.parametrize("name", [commit.HEAD, commit.FINGERPRINT])
@pytest.mark.parametrize("harm", ["flip", "missing", "foreign"])
def test_repair_keeps_every_sound_shard_whatever_happened_beside_them(
    tmp_path: Path, name: str, harm: str
) -> None:
    root = tmp_path / "cache"
    three_shards(root, "hidden")
    other = tmp_path / "other"
    changed = fingerprint("hidden", teacher="another@1")
    with cache.Writer(other, changed, head=head(1)) as writer:
        writer.append(record(0, "hidden"))
        writer.commit("unit")
    path = root / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    harms: dict[str, Callable[[], object]] = {
        "flip": lambda: path.write_bytes(data),
        "missing": path.unlink,
        "foreign": lambda: path.write_bytes((other / name).read_bytes()),
    }
    harms[harm]()
    findings = verify(root)
    assert findings
    assert withdraw(root, findings) == []
    assert (
        len(commit.record_names(open_store(root))) == len(list((root / commit.SHARDS).glob("*.arrow"))) == 3
    )


@pytest.mark.parametrize("folder", [commit.SHARDS, commit.COMMITS])
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EACCES, "no permission to read it"),
        (errno.EMFILE, "Too many open files"),
        (errno.EIO, "Input/output error"),
        (errno.ESTALE, "Stale file handle"),
    ],
)
def test_files_that_the_machine_fails_to_read_are_no_damage_and_are_not_withdrawn(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    code: int,
    said: str,
) -> None:
    three_shards(tmp_path)
    original = os.open

    def fail(path: Path, *args: int, **kwargs: int) -> int:
        if Path(path).parent.name == folder:
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        assert main(["verify", "--repair", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path}/{folder}/")
    assert f"{said}; nothing was changed" in captured.err
    assert captured.err.count("\n") == 1
    assert (verify(tmp_path), len(cache.open(tmp_path))) == ([], 9)


def test_a_cache_of_another_codec_is_not_called_damaged(tmp_path, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(codec, "CODEC_VERSION", 1)
        write(tmp_path, range(2))
    with pytest.raises(cache.CacheError, match="codec version 1, this program reads version 2") as caught:
        cache.open(tmp_path).verify()
    assert "Delete" not in str(caught.value)
