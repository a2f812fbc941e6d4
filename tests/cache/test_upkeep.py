"""Prune and merge: the rows that were meant, the others bit by bit as they were, and a death at any step
mended by a rerun.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import cache
from cache import upkeep
from cache.__main__ import main
from cache.heads import head_digest
from cache.store import open_store
from cache.upkeep import merge, prune
from tests.support.cache_samples import KINDS, assert_same, files, fingerprint, head, record, row_id, write
from tests.support.cache_writers import DIED, STEPS, assert_holds, code_of, die_at, in_a_fork

ROWS = range(16)  # row n is of policy n // 4, written at step 10 * (n // 4)


def filled(root: Path, kind: str = "topk", unit: int = 6) -> Path:
    """16 rows in units that mix policies."""
    for start in range(0, 16, unit):
        write(root, range(start, min(start + unit, 16)), kind, f"g{start:02d}")
    return root


def packed_signals(root: Path) -> dict[str, bytes | None]:
    table = cache.open(root).to_table(["row_id", "signal"])
    return dict(zip(table["row_id"].to_pylist(), table["signal"].to_pylist(), strict=True))


def assert_left(root: Path, numbers: list[int], kind: str, before: dict[str, bytes | None]) -> None:
    """Exactly these rows, sound, signals byte for byte as before, and no file that no record names."""
    snapshot = cache.open(root)
    assert snapshot.row_ids == sorted(row_id(n) for n in numbers)
    for number in numbers:
        assert_same(snapshot[snapshot.position(row_id(number))], record(number, kind))
    assert packed_signals(root) == {row_id(n): before[row_id(n)] for n in numbers}
    assert snapshot.verify() == []
    assert snapshot.summary()["leftover_files"] == snapshot.summary()["duplicate_rows"] == 0
    assert len(files(root / "shards")) == len(files(root / "commits"))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_an_age_are_removed(tmp_path: Path, kind: str) -> None:
    before = packed_signals(filled(tmp_path, kind))
    size = cache.open(tmp_path).summary()["bytes"]
    planned = prune(tmp_path, max_age=15, at_step=30, dry_run=True)
    assert packed_signals(tmp_path) == before
    pruned = prune(tmp_path, max_age=15, at_step=30)  # ages 30, 20, 10, 0
    assert (pruned.rows, pruned.shards) == (planned.rows, planned.shards) == (8, 1)
    assert pruned.scored_tokens == planned.scored_tokens == sum(1 + n % 6 for n in range(8))
    assert pruned.num_bytes == size - cache.open(tmp_path).summary()["bytes"]
    assert_left(tmp_path, list(range(8, 16)), kind, before)
    assert cache.open(tmp_path).summary()["scored_tokens"] == sum(1 + n % 6 for n in range(8, 16))
    assert prune(tmp_path, max_age=15, at_step=30) == upkeep.Pruned()


def test_ages_are_of_one_run(tmp_path: Path) -> None:
    filled(tmp_path)
    with cache.Writer(tmp_path, fingerprint()) as writer:
        for number in range(16, 20):
            writer.append(record(number, run_id="other", policy_step=0))
        writer.commit("other")
    with pytest.raises(
        cache.CacheError, match=r"at_step is a step of which run\? It holds rows of demo, other; set run_id"
    ):
        prune(tmp_path, max_age=0, at_step=30)
    with pytest.raises(cache.CacheError, match=r"there is no run demp\. It holds rows of demo, other"):
        prune(tmp_path, max_age=0, at_step=30, run_id="demp")
    assert prune(tmp_path, max_age=0, at_step=30, run_id="demo").rows == 12
    assert sorted(cache.open(tmp_path).row_ids) == sorted(row_id(n) for n in range(12, 20))


def test_rows_of_policies_are_removed(tmp_path: Path) -> None:
    before = packed_signals(filled(tmp_path))
    assert prune(tmp_path, policies=[f"{1:016x}", f"{2:016x}"]).rows == 8
    assert_left(tmp_path, [*range(4), *range(12, 16)], "topk", before)
    with pytest.raises(cache.CacheError, match="2 policies begin with '0000'"):
        prune(tmp_path, policies=["0000"])
    with pytest.raises(cache.CacheError, match="0 policies begin with 'beef'"):
        prune(tmp_path, policies=["beef"])


def test_a_size_keeps_the_newest_whole_shards(tmp_path: Path) -> None:
    before = packed_signals(filled(tmp_path, unit=4))
    whole, records = cache.open(tmp_path).summary()["bytes"], cache.open(tmp_path).commit_records()
    assert prune(tmp_path, max_bytes=whole).rows == 0
    limit = whole - records[0].num_bytes - 1
    planned = prune(tmp_path, max_bytes=limit, dry_run=True)
    assert prune(tmp_path, max_bytes=limit) == planned
    assert (planned.rows, planned.shards) == (8, 2)
    assert planned.num_bytes == records[0].num_bytes + records[1].num_bytes
    assert cache.open(tmp_path).summary()["bytes"] <= limit
    assert_left(tmp_path, list(range(8, 16)), "topk", before)
    with pytest.raises(cache.CacheError, match=r"needs [0-9,]+ bytes even with no rows; max_bytes is 10"):
        prune(tmp_path, max_bytes=10)


@pytest.mark.parametrize(
    "rules", [{}, {"max_age": 3, "max_bytes": 5}, {"max_age": 3}, {"max_age": -1, "at_step": 3}]
)
def test_a_prune_needs_one_whole_rule(tmp_path: Path, rules: dict[str, int]) -> None:
    filled(tmp_path)
    with pytest.raises(cache.CacheError, match=r"one rule|max_age must be at least 0 and needs at_step"):
        prune(tmp_path, **rules)
    assert len(cache.open(tmp_path)) == 16


@pytest.mark.parametrize("more", [{"run_id": "demo"}, {"at_step": 30}])
@pytest.mark.parametrize("rule", [{"policies": [f"{1:016x}"]}, {"max_bytes": 20_000}])
def test_a_prune_ignores_no_option(tmp_path: Path, rule: dict[str, object], more: dict[str, object]) -> None:
    filled(tmp_path)
    with pytest.raises(
        cache.CacheError, match=r"at_step and run_id apply to max_age only.* Nothing was removed"
    ):
        prune(tmp_path, **rule, **more)
    assert len(cache.open(tmp_path)) == 16


def test_stage_one_writes_pruned_rows_again(tmp_path: Path) -> None:
    filled(tmp_path)
    prune(tmp_path, max_age=0, at_step=30)
    filled(tmp_path)
    assert_holds(tmp_path, list(ROWS))


@pytest.mark.thorough
def test_a_prune_or_merge_that_dies_anywhere_is_mended_by_the_next(tmp_path: Path) -> None:
    """In a process of its own: forks of one with many threads are unsafe."""
    from tests.support.helpers import run_python

    code = (
        "import tests.cache.test_upkeep as t; from pathlib import Path;"
        f" t.die_everywhere(Path({str(tmp_path)!r}))"
    )
    assert "died" in run_python("-c", code).expect_success().out


def work_and_die(work: Callable[[Path], object], root: Path, count: int, when: str) -> None:
    die_at(count, when, STEPS)
    work(root)


def die_everywhere(folder: Path) -> None:
    """A prune and a merge, killed before and after each step; what is left is sound, and a rerun completes
    it.
    """
    whole = filled(folder / "whole", unit=12)
    before = packed_signals(whole)
    works = {
        "prune": lambda root: prune(root, max_age=15, at_step=30),
        "merge": lambda root: merge(root, [whole]),
    }
    for name, work in works.items():
        count = died = 0
        while died == count:
            count += 1
            for when in ("before", "after"):
                root = folder / f"{name}-{count}-{when}"
                if name == "prune":
                    shutil.copytree(whole, root)

                code = code_of(in_a_fork(partial(work_and_die, work, root, count, when)))
                died += code == DIED and when == "after"
                if cache.exists(root):
                    snapshot = cache.open(root)
                    assert name == "merge" or set(snapshot.row_ids) >= {row_id(n) for n in range(8, 16)}
                    assert snapshot.verify() == []
                work(root)
                left = list(range(8, 16)) if name == "prune" else list(ROWS)
                assert cache.open(root).row_ids == sorted(row_id(n) for n in left)
                assert packed_signals(root) == {row_id(n): before[row_id(n)] for n in left}
                assert cache.open(root).verify() == []
                assert cache.open(root).summary()["duplicate_rows"] == 0
        print(name, "died", died)
        assert died > 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_copies_shards_as_they_are(tmp_path: Path, kind: str) -> None:
    for name, rows in (("one", range(4)), ("two", range(4, 10))):
        write(tmp_path / name, rows, kind, unit=name)
    merged = merge(tmp_path / "both", [tmp_path / "one", tmp_path / "two"])
    assert (merged.shards, merged.rows, merged.shards_there, merged.differences) == (2, 10, 0, [])
    before = packed_signals(tmp_path / "one") | packed_signals(tmp_path / "two")
    assert_left(tmp_path / "both", list(range(10)), kind, before)
    for name in ("one", "two"):
        for path in (tmp_path / name / "shards").iterdir():
            assert (tmp_path / "both/shards" / path.name).read_bytes() == path.read_bytes()
    assert head_digest(open_store(tmp_path / "both")) == head_digest(open_store(tmp_path / "one"))
    again = merge(tmp_path / "both", [tmp_path / "one", tmp_path / "two"])
    assert (again.shards, again.shards_there) == (0, 2)


def test_rows_that_several_caches_hold_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "one", range(6), unit="a")
    write(tmp_path / "two", range(3, 9), unit="b")
    write(tmp_path / "three", range(6), unit="a")
    merge(tmp_path / "one", [tmp_path / "two", tmp_path / "three"])
    assert_holds(tmp_path / "one", list(range(9)))
    assert cache.open(tmp_path / "one").summary()["duplicate_rows"] == 3
    assert len(files(tmp_path / "one/commits")) == 2


def test_caches_that_mean_different_things_are_not_merged(tmp_path: Path) -> None:
    write(tmp_path / "one", range(4))
    with cache.Writer(tmp_path / "two", fingerprint(teacher="another")) as writer:
        writer.append(record(5))
        writer.commit("x")
    for target, sources in (("new", ("one", "two")), ("one", ("two",))):
        with pytest.raises(
            cache.CacheError, match=r"the cache's teacher is \"a-teacher@1f2e\", expected \"another\""
        ):
            merge(tmp_path / target, [tmp_path / name for name in sources])
    assert not (tmp_path / "new").exists()
    assert_holds(tmp_path / "one", list(range(4)))
    with pytest.raises(cache.CacheError, match="one or more caches into another one"):
        merge(tmp_path / "one", [tmp_path / "one"])


def test_a_merge_gives_no_foreign_fingerprint_to_rows_that_lost_theirs(tmp_path: Path) -> None:
    write(tmp_path / "one", range(4))
    with cache.Writer(tmp_path / "two", fingerprint(teacher="another")) as writer:
        writer.append(record(5))
        writer.commit("x")
    (tmp_path / "two" / "fingerprint.json").unlink()
    with pytest.raises(cache.CacheError, match=r"the committed rows were written under another fingerprint"):
        merge(tmp_path / "two", [tmp_path / "one"])
    assert not cache.exists(tmp_path / "two")


def test_a_damaged_tokenizer_is_neither_shown_nor_merged(tmp_path: Path) -> None:
    with cache.Writer(tmp_path / "one", fingerprint(), tokenizer_json='{"a":\r\n"é"}') as writer:
        writer.append(record(5))
        writer.commit("x")
    merge(tmp_path / "two", [tmp_path / "one"])
    path = tmp_path / "one" / "tokenizer.json"
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == path.read_bytes()
    path.write_text('{"a":"e"}')
    for use in (
        lambda: cache.open(tmp_path / "one").tokenizer_file(),
        lambda: merge(tmp_path / "3", [tmp_path / "one"]),
    ):
        with pytest.raises(
            cache.CacheError, match=r"tokenizer\.json: sha256 is [0-9a-f]{8}…, fingerprint\.json says"
        ):
            use()
    assert not cache.exists(tmp_path / "3")
    path.unlink()
    assert cache.open(tmp_path / "one").tokenizer_file() is None


def test_a_tokenizer_that_no_fingerprint_names_is_not_the_caches(tmp_path: Path) -> None:
    write(tmp_path, range(4))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert cache.open(tmp_path).tokenizer_file() is None


def test_caches_with_different_heads_are_not_merged(tmp_path: Path) -> None:
    write(tmp_path / "one", range(4), "hidden")
    with cache.Writer(tmp_path / "two", fingerprint("hidden"), head=head(1)) as writer:
        writer.append(record(5, "hidden"))
        writer.commit("x")
    with pytest.raises(cache.CacheError, match="different teacher heads"):
        merge(tmp_path / "both", [tmp_path / "one", tmp_path / "two"])
    assert not (tmp_path / "both").exists()


def test_recorded_differences_are_told(tmp_path: Path) -> None:
    write(tmp_path / "one", range(4))
    other = cache.Fingerprint(fingerprint().must_match, {"student": "b-student", "dataset": "problems.jsonl"})
    with cache.Writer(tmp_path / "two", other) as writer:
        writer.append(record(5))
        writer.commit("x")
    merged = merge(tmp_path / "both", [tmp_path / "one", tmp_path / "two"])
    assert merged.differences == ['student is "b-student", the cache was started with "a-student"']


def test_a_damaged_shard_is_not_copied(tmp_path: Path) -> None:
    write(tmp_path / "one", range(4), unit="a")
    write(tmp_path / "one", range(4, 8), unit="b")
    shard = cache.open(tmp_path / "one").commit_records()[1].shard
    data = bytearray((tmp_path / "one" / shard).read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / "one" / shard).write_bytes(data)
    with pytest.raises(cache.CacheError, match=r"is damaged: .* run `dualkl cache verify`"):
        merge(tmp_path / "both", [tmp_path / "one"])
    assert_holds(tmp_path / "both", list(range(4)))
    assert len(files(tmp_path / "both/shards")) == 1


def test_the_commands_say_what_they_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = str(filled(tmp_path / "one")), str(tmp_path / "two")
    assert main(["merge", two, one]) == 0
    assert "3 shards (16 rows, " in (text := capsys.readouterr().out)
    assert f"copied; {two} holds 16 rows.\n" in text
    assert main(["prune", two, "--max_age", "15", "--at_step", "30", "--dry_run"]) == 0
    assert "8 rows (" in (text := capsys.readouterr().out)
    assert f"1 whole shards) would be removed; {two} holds 16 rows." in text
    assert main(["prune", two, "--policy", f"{0:016x}", "--policy", f"{1:016x}"]) == 0
    assert f"removed; {two} holds 8 rows." in capsys.readouterr().out
    assert main(["merge", two, one]) == 0
    assert "2 shards (12 rows, " in (text := capsys.readouterr().out)
    assert "1 were there already" in text
    assert main(["prune", two, "--max_age", "3"]) == 2
    assert "error: max_age must be at least 0 and needs at_step" in capsys.readouterr().err
