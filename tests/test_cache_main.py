"""`python -m cache`: what it prints, on how many columns, and its exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest

import cache
from cache.__main__ import main
from cache.view import fit, pad, top_ids
from tests.cache_samples import KINDS, VOCAB, bfloat16, files, fingerprint, head, log_softmax, record, row_id, write

WORDS = [f"w{i}" for i in range(VOCAB)]


def shown(token):
    return {7: r'"\n"', 8: '"語"'}.get(int(token), f'"w{token}"')


def tokenizer_json() -> str:
    """One word an id; id 7 is a line break, id 8 a wide character."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["\n" if i == 7 else "語" if i == 8 else word for i, word in enumerate(WORDS)]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0")
    return tokenizers.Tokenizer(model).to_str()


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert all(len(line) <= 100 for line in captured.out.splitlines() if "/" not in line)
        return code, captured.out, captured.err

    return call


def test_summary_prints_a_table_or_json(tmp_path, run):
    write(tmp_path, range(9))
    code, out, _ = run("summary", tmp_path)
    assert code == 0
    summary = cache.open(tmp_path).summary()
    for text in (
        "rows            9 in 1 shards", "scored tokens   " + str(summary["scored_tokens"]), "per scored token",
        "kind topk", "eos 6, length 3", "0: 4 rows, 1: 4 rows, 2: 1 rows", "teacher H, nats", "tail mass", "demo",
    ):  # fmt: skip
        assert text in out
    code, out, _ = run("summary", tmp_path, "--json")
    assert code == 0
    assert json.loads(out) == summary


@pytest.mark.parametrize("kind", KINDS)
def test_show_prints_text_and_every_token(tmp_path, run, kind):
    with cache.Writer(tmp_path, fingerprint(kind), tokenizer_json(), head() if kind == "hidden" else None) as writer:
        writer.append(record(5, kind))
        writer.append(record(4, kind, completion_ids=[7, 8, 7, 8, 9]))
        writer.commit("g0")
    row = record(5, kind)
    code, out, _ = run("show", tmp_path, "--row", row.row_id[:8])
    assert code == 0
    assert f"row {row.row_id}" in out
    assert "How much is 5 + 1?" in out
    assert "It is\n6." in out
    lines = [line.split() for line in out[out.index("pos  token") :].splitlines()[1:]]
    tokens = [line for line in lines if line[0] != "top:"]
    assert [line[1] for line in tokens] == [shown(i) for i in row.completion_ids]
    assert [line[2] for line in tokens] == [f"{x:.3f}" for x in row.behaviour_logprobs]
    scored = ["-"] * 6 if kind == "none" else [f"{x:.3f}" for x in row.teacher_logprobs]
    assert [line[3] for line in tokens] == scored
    tops = [line[1:] for line in lines if line[0] == "top:"]
    assert len(tops) == (0 if kind == "none" else 6)
    if kind in ("topk", "full"):
        assert [line[0] for line in tops] == [shown(i) for i in row.top1_id]
        assert float(tops[0][1].rstrip("%")) == pytest.approx(100 * np.exp(row.top1_logprob[0]), rel=0.02)
    other = run("show", tmp_path, "--row", row_id(4))[1]
    assert shown(7) in other
    assert shown(8) in other


def test_show_without_a_tokenizer_prints_ids(tmp_path, run):
    write(tmp_path, range(2))
    out = run("show", tmp_path, "--index", 1)[1]
    row = cache.open(tmp_path)[1]
    assert f"    0  {row.completion_ids[0]} " in out


def test_the_top_five_of_hidden_states_and_logits_are_those_of_the_whole_vocabulary(monkeypatch):
    monkeypatch.setattr("cache.view.IDS_PER_TILE", 64)
    rng = np.random.default_rng(0)
    weights, states = head(), bfloat16(rng.normal(size=(4, 7)))
    logits = cache.to_float32(states, "bfloat16") @ cache.to_float32(weights.weight, "bfloat16").T + weights.bias
    logits = 30 * np.tanh(logits * 0.5 / 30)
    expected = log_softmax(logits.astype(np.float64))
    for signal in (cache.Hidden(states, "bfloat16"), cache.Full(logits.astype(np.float32), "float32")):
        ids, probabilities = top_ids(record(3, signal=signal), lambda: weights)
        np.testing.assert_array_equal(ids, np.argsort(-expected, 1)[:, :5])
        np.testing.assert_allclose(probabilities, -np.sort(-np.exp(expected), 1)[:, :5], rtol=1e-4)
    assert top_ids(record(3, signal=cache.Hidden(states, "bfloat16")), lambda: None) is None


def test_verify_says_sound_or_names_the_fault(tmp_path, run):
    write(tmp_path, range(4))
    assert run("verify", tmp_path) == (0, f"{tmp_path} is sound: 4 rows.\n", "")
    path = tmp_path / "shards" / files(tmp_path / "shards")[0]
    path.write_bytes(path.read_bytes()[:-10])
    code, out, _ = run("verify", tmp_path)
    assert code == 1
    assert path.name in out
    assert out.endswith(f"1 fault in {tmp_path}.\n")
    code, _, err = run("show", tmp_path)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["summary", "nowhere"], "nowhere holds no cache (no fingerprint.json)"),
        (["verify", "nowhere"], "nowhere holds no cache (no fingerprint.json)"),
        (["show", "{root}", "--index", "4"], "has 4 committed rows; there is no row 4"),
        (["show", "{root}", "--row", "zz"], "0 rows begin with 'zz'"),
        (["show", "{root}", "--row", ""], "4 rows begin with ''"),
    ],
)
def test_wrong_input_ends_in_one_sentence_and_code_2(tmp_path, run, arguments, sentence):
    write(tmp_path, range(4))
    code, out, err = run(*(argument.format(root=tmp_path) for argument in arguments))
    assert (code, out) == (2, "")
    assert sentence in err


def test_unknown_commands_end_with_code_2():
    with pytest.raises(SystemExit) as caught:
        main(["polish", "x"])
    assert caught.value.code == 2


def test_it_runs_as_a_module_and_into_a_closed_pipe(tmp_path):
    write(tmp_path, range(4))
    shell = f"{sys.executable} -m cache show {tmp_path} | head -n 1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("row ")
    assert done.stderr == ""


def test_texts_are_cut_and_padded_by_terminal_columns():
    assert fit("abcdef", 6) == "abcdef"
    assert fit("abcdefg", 6) == "abcde…"
    assert fit("語語語語", 6) == "語語…"
    assert pad("語", 5) == "語   "


def shown_rows(text: str) -> list[str]:
    """First words of a table of rows, below its two lines of heads."""
    return [line.split()[0] for line in text.splitlines()[2:]]


def test_show_lists_the_rows_that_the_student_likes_and_the_teacher_does_not(tmp_path, capsys):
    write(tmp_path, range(9))
    sums = {n: float((record(n).behaviour_logprobs - record(n).teacher_logprobs).sum()) for n in range(9)}
    worst = sorted(sums, key=lambda n: -sums[n])
    assert main(["show", str(tmp_path), "--worst", "4"]) == 0
    text = capsys.readouterr().out
    assert shown_rows(text) == [row_id(n)[:8] for n in worst[:4]]
    for line, number in zip(text.splitlines()[2:], worst, strict=False):
        assert f"{sums[number]:.3f}" in line
        assert f"It is {number + 1}." in line
    assert all(len(line) <= 100 for line in text.splitlines())
    assert main(["show", str(tmp_path), "--worst", "1"]) == 0
    assert f"row {row_id(worst[0])}" in capsys.readouterr().out


def test_show_lists_the_longest_rows_and_those_of_a_prompt(tmp_path, capsys):
    write(tmp_path, range(9))
    assert main(["show", str(tmp_path), "--longest", "3"]) == 0
    by_length = sorted(range(9), key=lambda n: (-(1 + n % 6), row_id(n)))
    assert shown_rows(capsys.readouterr().out) == [row_id(n)[:8] for n in by_length[:3]]
    assert main(["show", str(tmp_path), "--prompt", "p1", "--tokens"]) == 0
    text = capsys.readouterr().out
    assert [
        line.split()[1].rstrip(",") for line in text.splitlines() if line.startswith("row ") and "number" in line
    ] == (sorted(row_id(n) for n in (2, 3)))


def test_show_refuses_selections_in_a_sentence(tmp_path, capsys):
    write(tmp_path / "scored", range(4))
    write(tmp_path / "none", range(4), "none")
    cases = {
        ("scored", "--prompt", "x"): "no prompt id begins with 'x'",
        ("scored", "--prompt", "p"): "2 prompt ids begin with 'p' (p0, p1); give one",
        ("scored", "--worst", "0"): "--worst is 0; expected a number of rows, at least 1",
        ("none", "--worst", "3"): "is not scored (signal kind none)",
    }
    for (name, *options), sentence in cases.items():
        assert main(["show", str(tmp_path / name), *options]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["show", str(tmp_path / "none"), "--longest", "2"]) == 0
