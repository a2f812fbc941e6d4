"""What must match between a cache and a program, in which words a mismatch is told, and what is only
recorded.
"""

import json

import pytest

import cache
from cache import commit
from tests.support.cache_samples import fingerprint, record, write


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher": "b@99"}, 'the cache\'s teacher is "a-teacher@1f2e", expected "b@99".'),
        ({"vocab_size": 151_646}, "the cache's vocab_size is 503, expected 151646."),
        ({"signal": {"kind": "topk", "k": 9, "temperature": 1.0}}, "the cache's signal.k is 5, expected 9."),
        ({"signal": {"kind": "full", "k": 5, "temperature": 1.0}}, 'signal.kind is "topk", expected "full".'),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs.enable_thinking is false, expected absent."),
    ],
)
def test_a_part_that_must_match_and_does_not_is_named(tmp_path, changes, sentence):
    write(tmp_path, range(2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(cache.CacheError) as caught:
        cache.Writer(tmp_path, fingerprint(**changes))
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert sentence in str(caught.value)
    assert "use another cache directory, or set " in str(caught.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_long_values_are_shown_where_they_part(tmp_path):
    template = "{% for turn in turns %}" + "x" * 500
    write_with = fingerprint(chat_template=template + "END" + "y" * 80)
    cache.Writer(tmp_path, write_with)
    with pytest.raises(cache.CacheError) as caught:
        cache.Writer(tmp_path, fingerprint(chat_template=template + "DONE" + "y" * 80))
    assert "xxxENDyyy" in str(caught.value)
    assert "xxxDONEyyy" in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_recorded_differences_are_told_not_refused(tmp_path):
    write(tmp_path, range(2))
    other = cache.Fingerprint(fingerprint().must_match, {"student": "b-student", "dataset": "problems.jsonl"})
    writer = cache.Writer(tmp_path, other)
    assert writer.differences == ['student is "b-student", the cache was started with "a-student"']
    assert cache.open(tmp_path).fingerprint.recorded["student"] == "a-student"
    assert cache.Writer(tmp_path, fingerprint()).differences == []


def test_a_fingerprint_without_signal_or_vocabulary_is_refused():
    must_match = fingerprint().must_match
    with pytest.raises(
        cache.CacheError, match=r"signal is 'topk'; expected a kind among none, topk, nucleus, hidden"
    ):
        cache.Fingerprint({**must_match, "signal": "topk"})
    with pytest.raises(cache.CacheError, match="vocab_size is None; expected a number of ids"):
        cache.Fingerprint({**must_match, "vocab_size": None})
    with pytest.raises(cache.CacheError, match="must_match cannot be written as JSON"):
        cache.Fingerprint({**must_match, "teacher": object()})


def test_tuples_and_numbers_compare_as_json_does(tmp_path):
    cache.Writer(tmp_path, fingerprint(chat_template_kwargs={"tools": ("a", "b")}))
    cache.Writer(tmp_path, fingerprint(chat_template_kwargs={"tools": ["a", "b"]}))
    assert cache.open(tmp_path).fingerprint.must_match["format_version"] == 1


def test_a_lost_fingerprint_comes_back_only_from_a_writer_of_the_same_rows(tmp_path):
    write(tmp_path, range(2))
    kept = (tmp_path / "fingerprint.json").read_bytes()
    (tmp_path / "fingerprint.json").unlink()
    assert "fingerprint.json is missing" in str(cache.verify(tmp_path)[0])
    with pytest.raises(cache.CacheError, match=r"holds no cache \(no fingerprint\.json\)"):
        cache.open(tmp_path)
    with pytest.raises(cache.CacheError, match="the committed rows were written under another fingerprint"):
        cache.Writer(tmp_path, fingerprint(teacher="b"))
    cache.Writer(tmp_path, fingerprint())
    assert (tmp_path / "fingerprint.json").read_bytes() == kept
    assert cache.verify(tmp_path) == []


def test_shards_of_another_cache_are_not_mixed_in(tmp_path):
    write(tmp_path / "a", range(2))
    with cache.Writer(tmp_path / "b", fingerprint(teacher="b")) as writer:
        writer.append(record(7))
        writer.commit("g7")
    for folder in ("commits", "shards"):
        for path in (tmp_path / "b" / folder).iterdir():
            path.rename(tmp_path / "a" / folder / path.name)
    with pytest.raises(
        cache.CacheError, match=r"was written under another fingerprint .*; move it and commits/g7-"
    ):
        cache.open(tmp_path / "a")
    assert "written under another fingerprint" in str(cache.verify(tmp_path / "a")[0])


def test_the_first_writers_tokenizer_is_kept(tmp_path):
    cache.Writer(tmp_path, fingerprint(), tokenizer_json='{"first": 1}')
    cache.Writer(tmp_path, fingerprint(), tokenizer_json='{"second": 2}')
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"first": 1}
    assert cache.verify(tmp_path) == []
    (tmp_path / "tokenizer.json").write_text("{}")
    (finding,) = cache.verify(tmp_path)
    assert finding.file == "tokenizer.json"
    assert "fingerprint.json says" in finding.message


def test_a_newer_format_is_not_guessed_at(tmp_path):
    must_match = {**fingerprint().must_match, "format_version": 2}
    newer = commit.seal({"must_match": must_match, "recorded": {}, "tokenizer_sha256": None})
    (tmp_path / "fingerprint.json").write_bytes(newer)
    for use in (lambda: cache.open(tmp_path), lambda: cache.Writer(tmp_path, fingerprint())):
        with pytest.raises(cache.CacheError, match=r"has format version 2, this program reads version 1"):
            use()


def test_a_fingerprint_of_millions_of_values_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    write(tmp_path, range(2))
    with pytest.raises(cache.CacheError, match="recorded holds more than 100,000 values"):
        cache.Fingerprint(fingerprint().must_match, {"x": [{}] * 100_000})
    (tmp_path / commit.FINGERPRINT).write_bytes(b'{"recorded":{"x":[' + b"{}," * 100_000 + b"{}]}}\n")
    monkeypatch.setattr("cache.fingerprint.unseal", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(cache.CacheError, match=r"fingerprint\.json holds more than 100,000 values"):
        cache.open(tmp_path)
