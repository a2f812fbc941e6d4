"""`python -m cache`: what it prints, on how many columns, and its exit codes."""

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import cache
from cache.__main__ import main
from cache.view import fit, fit_words, pad
from tests.support.cache_samples import (
    KINDS,
    VOCAB,
    bfloat16,
    files,
    fingerprint,
    head,
    log_softmax,
    record,
    row_id,
    write,
)

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
        lines = re.sub(r"\x1b\[[0-9;]+m", "", captured.out).splitlines()
        assert all(len(line) <= 100 for line in lines if "/" not in line)
        return code, captured.out, captured.err

    return call


def test_summary_prints_a_table_or_json(tmp_path, run):
    write(tmp_path, range(9))
    code, out, _ = run("summary", tmp_path)
    assert code == 0
    summary = cache.open(tmp_path).summary()
    for text in (
        "rows            9 in 1 shards",
        "scored tokens   " + str(summary["scored_tokens"]),
        "per scored token",
        "kind topk",
        "eos 6, length 3",
        "0: 4 rows, 1: 4 rows, 2: 1 rows",
        "teacher H, nats",
        "tail mass",
        "demo",
    ):
        assert text in out
    code, out, _ = run("summary", tmp_path, "--json")
    assert code == 0
    assert json.loads(out) == summary


@pytest.mark.parametrize("kind", KINDS)
def test_show_prints_text_and_every_token(tmp_path, run, kind):
    with cache.Writer(
        tmp_path, fingerprint(kind), tokenizer_json(), head() if kind == "hidden" else None
    ) as writer:
        writer.append(record(5, kind))
        writer.append(record(4, kind, completion_ids=[7, 8, 7, 8, 9]))
        writer.commit("g0")
    row: Any = record(5, kind)
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
    monkeypatch.setattr("cache.matrices.IDS_PER_TILE", 64)
    rng = np.random.default_rng(0)
    weights, states = head(), bfloat16(rng.normal(size=(4, 7)))
    assert weights.bias is not None
    logits = (
        cache.to_float32(states, "bfloat16") @ cache.to_float32(weights.weight, "bfloat16").T + weights.bias
    )
    logits = 30 * np.tanh(logits * 0.5 / 30)
    expected = log_softmax(logits.astype(np.float64))
    for signal in (cache.Hidden(states, "bfloat16"), cache.Full(logits.astype(np.float32), "float32")):
        found = signal.most_likely(5, lambda: weights)
        assert found is not None
        ids, probabilities = found
        np.testing.assert_array_equal(ids, np.argsort(-expected, 1)[:, :5])
        np.testing.assert_allclose(probabilities, -np.sort(-np.exp(expected), 1)[:, :5], rtol=1e-4)
    assert cache.Hidden(states, "bfloat16").most_likely(5, lambda: None) is None


def gap(row):
    """Sum over tokens of behaviour - teacher logprob, token by token."""
    return sum(float(b) - float(t) for b, t in zip(row.behaviour_logprobs, row.teacher_logprobs, strict=True))


def listed(out):
    """The beginnings of row ids in the table that `show` prints; each is followed by its completion."""
    lines = out.splitlines()
    assert lines[0] == "sum: behaviour - teacher logprob over the tokens of a row, nats"
    assert lines[1].split() == ["row", "prompt", "refresh", "step", "tokens", "finish", "sum"]
    assert all(line.startswith("    ") for line in lines[3::2])
    return [line.split()[0] for line in lines[2::2]]


def shortened(rows):
    return [row.row_id[:8] for row in rows]


def test_show_worst_lists_the_rows_of_the_largest_gap(tmp_path, run):
    write(tmp_path, range(9), unit="a")
    write(tmp_path, range(9, 13), unit="b")
    rows = sorted((record(i) for i in range(13)), key=gap, reverse=True)
    code, out, _ = run("show", tmp_path, "--worst", 4)
    assert code == 0
    assert listed(out) == shortened(rows[:4])
    lines = out.splitlines()[2:]
    for row, line, text in zip(rows[:4], lines[::2], lines[1::2], strict=True):
        cells = line.split()[1:]
        assert text.strip() == " ".join(row.completion_text.split())
        assert cells == [
            row.prompt_id,
            str(row.refresh_index),
            str(row.policy_step),
            str(len(row.completion_ids)),
            row.finish_reason,
            f"{gap(row):.3f}",
        ]
    assert listed(run("show", tmp_path, "--worst", 99)[1]) == shortened(rows)


def test_show_longest_lists_the_rows_of_the_most_tokens_ties_by_row_id(tmp_path, run):
    write(tmp_path, range(13))
    rows = sorted((record(i) for i in range(13)), key=lambda row: (-len(row.completion_ids), row.row_id))
    assert len(rows[4].completion_ids) == len(rows[5].completion_ids)
    assert listed(run("show", tmp_path, "--longest", 5)[1]) == shortened(rows[:5])


def test_ties_in_the_gap_go_by_row_id(tmp_path, run):
    with cache.Writer(tmp_path, fingerprint()) as writer:
        for number in range(6):
            writer.append(record(3, row_id=row_id(number)))
        writer.commit("a")
    ids = sorted(row_id(number) for number in range(6))
    assert listed(run("show", tmp_path, "--worst", 4)[1]) == [name[:8] for name in ids[:4]]


def test_show_prompt_lists_its_rows_by_refresh_then_row_id(tmp_path, run):
    with cache.Writer(tmp_path, fingerprint()) as writer:
        for number in range(12):
            name = {0: "abc", 1: "abcd", 2: "xyz"}[number % 3]
            writer.append(record(number, prompt_id=name, refresh_index=2 - number // 4))
        writer.commit("a")

    def of(prompt):
        numbers = [n for n in range(12) if n % 3 == prompt]
        return [row_id(n)[:8] for n in sorted(numbers, key=lambda n: (2 - n // 4, row_id(n)))]

    assert listed(run("show", tmp_path, "--prompt", "abc")[1]) == of(
        0
    )  # the exact id, though abcd begins so too
    assert listed(run("show", tmp_path, "--prompt", "abcd")[1]) == of(1)
    assert listed(run("show", tmp_path, "--prompt", "x")[1]) == of(2)
    code, out, err = run("show", tmp_path, "--prompt", "ab")
    assert (code, out) == (2, "")
    assert "2 prompt ids begin with 'ab' (abc, abcd); give one" in err


def test_show_tokens_adds_each_row_in_full_and_one_row_is_always_full(tmp_path, run):
    write(tmp_path, range(9))
    full = {number: run("show", tmp_path, "--row", row_id(number))[1] for number in range(9)}
    order = sorted(range(9), key=lambda n: gap(record(n)), reverse=True)
    table = run("show", tmp_path, "--worst", 3)[1]
    assert run("show", tmp_path, "--worst", 3, "--tokens")[1] == table + "".join(
        "\n" + full[n] for n in order[:3]
    )
    assert run("show", tmp_path, "--worst", 1)[1] == full[order[0]]
    assert run("show", tmp_path, "--row", row_id(3), "--tokens")[1] == full[3]


def test_the_table_keeps_to_100_columns_and_two_lines_a_row(tmp_path, run):
    with cache.Writer(tmp_path, fingerprint()) as writer:
        for number, text in enumerate(["語" * 90, "a b\r\nc\x1b[2Jd" * 40, ""]):
            long = {"prompt_id": "p" * 40, "policy_step": 2**62, "refresh_index": 2**31 - 1}
            writer.append(record(number, completion_text=text, **(long if number == 1 else {})))
        writer.commit("a")
    out = run("show", tmp_path, "--longest", 3)[1]
    assert len(listed(out)) == 3
    assert all(fit(line, 100) == line for line in out.splitlines())
    assert "\x1b" not in out
    assert "語語" in out


def test_completions_of_the_table_end_between_words(tmp_path, run):
    text = "a completion of rather many words that would not fit into thirty columns " * 2
    with cache.Writer(tmp_path, fingerprint()) as writer:
        writer.append(record(0, completion_text=text))
        writer.append(record(1, completion_text="short"))
        writer.commit("a")
    lines = run("view", tmp_path)[1].splitlines()
    shown = {line.strip() for line in lines[3::2]}
    assert shown == {
        "short",
        "a completion of rather many words that would not fit into thirty columns a completion of rather…",
    }
    assert (fit_words("語" * 60, 10), fit_words("ab cd", 5), fit_words("ab cdef", 5)) == (
        "語語語語…",
        "ab cd",
        "ab…",
    )


def test_lines_are_coloured_on_a_terminal_alone(tmp_path, run, monkeypatch):
    with cache.Writer(tmp_path, fingerprint(), tokenizer_json()) as writer:
        writer.append(record(5, completion_text="\x1b[31mred \u202e", behaviour_logprobs=np.full(6, -0.01)))
        writer.commit("a")
    plain_text = run("show", tmp_path)[1]
    assert "\x1b" not in plain_text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    code, out, _ = run("show", tmp_path)
    assert code == 0
    assert re.sub(r"\x1b\[[0-9;]+m", "", out) == plain_text  # the same numbers
    assert "\x1b[1;38;5;202m" in out
    assert r"\x1b[31mred \u202e" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert run("show", tmp_path)[1] == plain_text


def test_the_row_ids_of_the_table_are_long_enough_to_name_one_row(tmp_path, run):
    ids = ["0123456789ab" + "0" * 20, "0123456789ac" + "0" * 20, "f" * 32]
    with cache.Writer(tmp_path, fingerprint()) as writer:
        for number, name in enumerate(ids):
            writer.append(record(number, row_id=name))
        writer.commit("a")
    names = listed(run("show", tmp_path, "--longest", 3)[1])
    assert names == [ids[2][:12], ids[1][:12], ids[0][:12]]
    for name in names:
        assert run("show", tmp_path, "--row", name)[0] == 0


def test_an_unscored_cache_lists_the_longest_and_refuses_the_worst(tmp_path, run):
    write(tmp_path, range(9), "none")
    out = run("show", tmp_path, "--longest", 2)[1]
    assert listed(out) == shortened([record(5), record(4)])
    assert [line.split()[6] for line in out.splitlines()[2::2]] == ["-", "-"]
    code, out, err = run("show", tmp_path, "--worst", 2)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is not scored (signal kind none): it has no teacher logprobs for --worst" in err


def test_view_lists_the_rows_in_order_a_page_at_a_time(tmp_path, run):
    write(tmp_path, range(9))
    ordered = sorted((record(i) for i in range(9)), key=lambda row: row.row_id)
    out = run("view", tmp_path, "--count", 4)[1]
    assert listed(out.rsplit("rows 0", 1)[0]) == shortened(ordered[:4])
    assert out.endswith("rows 0 to 3 of 9; for more add --first 4\n")
    assert listed(run("view", tmp_path, "--first", 4)[1]) == shortened(ordered[4:])
    assert listed(run("view", tmp_path, "--first", -2)[1]) == shortened(ordered[-2:])


def test_neither_the_worst_nor_the_longest_decode_more_than_they_print(tmp_path, run, monkeypatch):
    write(tmp_path, range(9))
    decoded = []
    decode = cache.shard.codec.decode
    monkeypatch.setattr("cache.shard.codec.decode", lambda *packed: decoded.append(1) or decode(*packed))
    run("show", tmp_path, "--worst", 2)
    run("show", tmp_path, "--longest", 2)
    assert len(decoded) == 4


def test_an_empty_cache_has_nothing_to_show(tmp_path, run):
    cache.Writer(tmp_path, fingerprint()).__enter__()
    for selector in ("--worst", "--longest"):
        code, out, err = run("show", tmp_path, selector, 1)
        assert (code, out) == (2, "")
        assert err == f"error: {tmp_path} has no committed rows yet.\n"
    assert run("show", tmp_path)[0] == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("sumary x", "unknown command dualkl cache sumary; did you mean summary?"),
        ("polish x", "unknown command dualkl cache polish; there are summary, view, show, verify,"),
        ("show x --tokns", "unknown option --tokns of dualkl cache show; did you mean --tokens?"),
        ("prune x --max_bites=3 --policy p", "unknown option --max_bites of dualkl cache prune; did you"),
        ("show x --worst", "--worst: needs a value; `dualkl cache show --help` lists what it takes."),
        ("show x --worst 3 --prompt p1", "--prompt: not allowed with argument --worst; `dualkl cache show"),
        ("view x --first two", "--first: expected a whole number, got two; `dualkl cache view --help`"),
        ("view", "ROOT is missing; `dualkl cache view --help` lists what it takes."),
        ("view x y", "unexpected argument y; `dualkl cache view --help` lists what it takes."),
        ("export x y --to csv", "--to: expected parquet, got csv; `dualkl cache export --help`"),
        ("export x y", "--to is missing; `dualkl cache export --help` lists what it takes."),
    ],
)
def test_a_mistyped_line_is_one_sentence_with_the_nearest_name(run, line, sentence):
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


def test_help_fits_a_screen_and_names_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["--help"], [], ["show", "--help"], ["prune", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert not caught.value.code
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("usage: dualkl cache")
        assert len(lines) <= 40


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
        (["view", "{root}", "--first", "4"], "has 4 committed rows; there is no row 4"),
        (["view", "{root}", "--count", "0"], "--count is 0; expected a number of rows, at least 1"),
        (["show", "{root}", "--row", "zz"], "0 row ids begin with 'zz'"),
        (["show", "{root}", "--row", ""], "4 row ids begin with ''"),
        (["show", "{root}", "--prompt", "zz"], "no prompt id begins with 'zz'"),
        (["show", "{root}", "--prompt", ""], "2 prompt ids begin with '' (p0, p1); give one"),
        (["show", "{root}", "--worst", "0"], "--worst is 0; expected a number of rows, at least 1"),
        (["show", "{root}", "--longest", "-3"], "--longest is -3; expected a number of rows, at least 1"),
    ],
)
def test_wrong_input_ends_in_one_sentence_and_code_2(tmp_path, run, arguments, sentence):
    write(tmp_path, range(4))
    code, out, err = run(*(argument.format(root=tmp_path) for argument in arguments))
    assert (code, out) == (2, "")
    assert sentence in err


@pytest.mark.parametrize(
    "command", ["summary", "show", "verify", "prune --max_bytes 9", "export --to parquet", "merge"]
)
def test_a_root_that_is_a_file_ends_in_one_sentence_and_code_2(tmp_path, run, command):
    write(tmp_path / "sound", range(4))
    (tmp_path / "file").write_text("no cache")
    (tmp_path / "odd" / "fingerprint.json").mkdir(parents=True)
    more = {"export": [tmp_path / "out"], "merge": [tmp_path / "sound"]}.get(command.split()[0], [])
    code, out, err = run(*command.split(), tmp_path / "file", *more)
    assert (code, out) == (2, "")
    assert (
        err
        == f"error: {tmp_path / 'file'} is a file; give the directory of a cache, which stage one writes.\n"
    )
    code, out, err = run(*command.split(), tmp_path / "file" / "below", *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {tmp_path / 'file' / 'below'}/")
    assert err.endswith(": Not a directory; fix that and rerun.\n")
    if command != "verify":  # which finds that fault
        code, out, err = run(*command.split(), tmp_path / "odd", *more)
        assert (code, out, err) == (
            2,
            "",
            f"error: {tmp_path}/odd/fingerprint.json is not a regular file; move it out of the cache"
            " and rerun.\n",
        )


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
