"""The cache as text, up to `WIDTH` columns wide: a summary table, and rollouts token by token.

Lines are `Styled`: `dualkl cache` colours them on a terminal.
"""

from __future__ import annotations

import json
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cache.commit import TOKENIZER
from cache.plain import plain
from cache.reader import Snapshot
from cache.schema import CacheError, Float32, Int32, Record

WIDTH = 100
NUM_TOP = 5
_MOST_POLICIES = 12
_APART, _FAR_APART = 1.0, 3.0  # nats between student and teacher on a token, from which its line is coloured
BOLD, DIM, APART, FAR_APART = "1", "2", "38;5;172", "1;38;5;202"
_PROMPT = 32  # columns of a prompt's id
_CHARACTERS_PER_COLUMN = 16  # combining characters take no column
_PIECE = 10_000  # characters per `textwrap` call, which is quadratic in a word's length


class Styled(str):
    """A line with its ANSI style; "" for none."""

    style: str

    def __new__(cls, text: str, style: str = "") -> Styled:
        line = super().__new__(cls, text)
        line.style = style
        return line


def summary_text(summary: dict[str, Any]) -> str:
    """Format `Snapshot.summary()` as the table of `dualkl cache summary`."""
    per_token, signal = summary["bytes_per_token"], summary["signal_bytes_per_token"]
    lines = [
        ("cache", summary["root"]),
        ("signal", ", ".join(f"{k} {v}" for k, v in sorted(summary["signal"].items()))),
        ("rows", f"{summary['rows']:,} in {summary['shards']:,} shards"),
        ("scored tokens", f"{summary['scored_tokens']:,} (and {summary['prompt_tokens']:,} prompt tokens)"),
        ("bytes", f"{summary['bytes']:,}" + (f", {per_token:,.1f} per scored token" if per_token else "")),
    ]
    if signal is not None:
        lines.append(("signal bytes", f"{summary['signal_bytes']:,}, {signal:,.1f} per scored token"))
    if summary["head_bytes"]:
        lines.append(("teacher head", f"{summary['head_bytes']:,} bytes"))
    reasons = summary["finish_reasons"]
    lines.append(("finish reasons", ", ".join(f"{k} {n:,}" for k, n in sorted(reasons.items())) or "-"))
    lines.append(
        ("refreshes", ", ".join(f"{k}: {n:,} rows" for k, n in summary["refresh_indices"].items()) or "-")
    )
    if summary["duplicate_rows"]:
        lines.append(("written twice", f"{summary['duplicate_rows']:,} rows; one copy of each is read"))
    if summary["leftover_files"]:
        files, num_bytes = summary["leftover_files"], summary["leftover_bytes"]
        left = f"{files:,} files, {num_bytes:,} bytes without a commit record"
        lines.append(("leftovers", f"{left}; ignored, removed by a writer after a day"))
    text = [part for name, value in lines for part in _wrap(f"{name:<16}", value)]
    return "\n".join([*text, *_quantile_lines(summary["quantiles"]), *_policy_lines(summary["policies"])])


def _wrap(label: str, value: str) -> list[str]:
    """Wrap text beside a label."""
    return textwrap.wrap(
        plain(value[:_PIECE]), WIDTH, initial_indent=label, subsequent_indent=" " * len(label)
    )


def _quantile_lines(quantiles: dict[str, dict[str, float] | None]) -> Iterator[str]:
    known = {name: values for name, values in quantiles.items() if values}
    if not known:
        return
    yield ""
    yield f"{'quantile':<20}" + "".join(f"{share:>10}" for share in next(iter(known.values())))
    units = {
        "tail_mass": "tail mass",
        "behaviour_entropy": "student H, nats",
        "teacher_entropy": "teacher H, nats",
    }
    for name, values in known.items():
        yield f"{units[name]:<20}" + "".join(f"{value:>10.2g}" for value in values.values())


def _policy_lines(policies: list[dict[str, Any]]) -> Iterator[str]:
    yield ""
    yield f"{'run':<34}{'policy step':>12}{'age':>8}  {'policy':<18}{'refresh':>8}{'rows':>10}"
    for policy in policies[-_MOST_POLICIES:]:
        run, name = fit(plain(policy["run_id"]), 33), fit(plain(policy["policy_hash"]), 17)
        step, age, refresh = policy["policy_step"], policy["age"], policy["refresh_index"]
        yield f"{run:<34}{step:>12,}{age:>8,}  {name:<18}{refresh:>8,}{policy['rows']:>10,}"
    if len(policies) > _MOST_POLICIES:
        yield f"({len(policies) - _MOST_POLICIES} earlier policies are in --json)"


def rows_text(snapshot: Snapshot, positions: Sequence[int], names: Sequence[str]) -> Iterator[str]:
    """Yield the table of several rows printed by `dualkl cache view` and `show`.

    Two lines per row name: its figures, then the beginning of its completion.
    """
    width = max(map(len, names), default=0)
    yield Styled("sum: behaviour - teacher logprob over the tokens of a row, nats", DIM)
    heads = f"{'refresh':>7}{'step':>9}{'tokens':>8}  {'finish':<7}{'sum':>10}"
    yield Styled(f"{pad('row', width + 2)}{pad('prompt', _PROMPT)}{heads}", BOLD)
    for position, name in zip(positions, names, strict=True):
        record = snapshot[position]
        gap = None
        if record.teacher_logprobs is not None:
            gap = float((record.behaviour_logprobs.astype(np.float64) - record.teacher_logprobs).sum())
        numbers = f"{record.refresh_index:>7}{record.policy_step:>9,}{len(record.completion_ids):>8,}"
        prompt = pad(plain(record.prompt_id), _PROMPT)
        cells = f"{name}  {prompt}{numbers}  {record.finish_reason:<7}{_number(gap, 10)}"
        per_token = 0.0 if gap is None else gap / len(record.completion_ids)
        yield Styled(fit(cells, WIDTH), _style_of(per_token))
        yield "    " + fit_words(_one_line(record.completion_text), WIDTH - 4)


def _one_line(text: str) -> str:
    """Return the start of a text, with white space collapsed and control characters escaped."""
    words = " ".join(text[: 10 * WIDTH].split())
    return plain(words[:WIDTH])


def record_text(snapshot: Snapshot, index: int) -> Iterator[str]:
    """Yield the lines of `dualkl cache show` for row `index`: its text, then two lines per token."""
    record = snapshot[index]
    unit = snapshot.index["unit"][index].as_py()
    yield Styled(f"row {record.row_id}, number {index} of {len(snapshot)}, unit {plain(unit)}", BOLD)
    policy = f"policy {record.policy_hash} at step {record.policy_step:,}, refresh {record.refresh_index}"
    yield plain(f"run {record.run_id}, {policy}")
    yield f"prompt {plain(record.prompt_id)}, occurrence {record.occurrence}, sample {record.sample_index}"
    yield from _text_lines(f"prompt, {len(record.prompt_ids)} tokens", record.prompt_text)
    ending = f"{len(record.completion_ids)} tokens, {record.finish_reason}"
    yield from _text_lines(f"completion, {ending}", record.completion_text)
    yield ""
    top = record.signal.most_likely(NUM_TOP, snapshot.head) if record.signal else None
    yield from _token_lines(record, top, token_names(snapshot))


def _text_lines(title: str, text: str) -> Iterator[str]:
    yield ""
    yield Styled(f"--- {title} ---", BOLD)
    for line in text.split("\n"):
        line = plain(line.expandtabs(4).removesuffix("\r"))
        for start in range(0, len(line) or 1, _PIECE):
            yield from textwrap.wrap(line[start : start + _PIECE], WIDTH) or [""]


def _token_lines(
    record: Record, top: tuple[Int32, Float32] | None, name_of: Callable[[int], str]
) -> Iterator[str]:
    legend = "nats: logprob of the token under student and teacher, their entropies H; tail: mass not kept"
    yield Styled(legend, DIM)
    names = f"{'student':>10}{'teacher':>10}{'student H':>11}{'teacher H':>11}{'tail':>10}"
    yield Styled(f"{'pos':>5}  {'token':<20}{names}", BOLD)
    teacher = (record.teacher_logprobs, record.teacher_entropy, record.log_tail_mass)
    for t, token in enumerate(record.completion_ids.tolist()):
        logprob, entropy, tail = (None if column is None else float(column[t]) for column in teacher)
        mass = None if tail is None else float(np.exp(tail))
        numbers = _number(float(record.behaviour_logprobs[t]), 10) + _number(logprob, 10)
        own = None if record.behaviour_entropy is None else float(record.behaviour_entropy[t])
        numbers += _number(own, 11) + _number(entropy, 11)
        last = f"{'-':>10}" if mass is None else f"{mass:>10.1e}"
        gap = 0.0 if logprob is None else float(record.behaviour_logprobs[t]) - logprob
        yield Styled(f"{t:>5}  {pad(name_of(token), 20)}{numbers}{last}", _style_of(gap))
        if top is not None:
            kept = [(i, p) for i, p in zip(top[0][t].tolist(), top[1][t].tolist(), strict=True) if i >= 0]
            most = "  ".join(f"{fit(name_of(i), 12)} {100 * p:.3g}%" for i, p in kept)
            yield Styled(fit(f"       top: {most}", WIDTH), DIM)


def _style_of(gap: float) -> str:
    """Style of a line by the nats that the student finds its token, or its tokens on average, likelier."""
    return FAR_APART if gap >= _FAR_APART else APART if gap >= _APART else ""


def _number(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.3f}"


def fit(text: str, width: int) -> str:
    """Cut `text` to `width` terminal columns."""
    used = kept = 0
    for place, character in enumerate(text):
        used += _columns(character)
        if used > width or place >= _CHARACTERS_PER_COLUMN * width:
            return text[:kept] + "…"
        kept = place + 1 if used < width else kept
    return text


def fit_words(text: str, width: int) -> str:
    """Cut `text` to `width` terminal columns between two words, where there are several."""
    cut = fit(text, width)
    if cut == text:
        return text
    words = cut[:-1].rpartition(" ")[0] if not text.startswith(f"{cut[:-1]} ") else cut[:-1]
    return f"{words or cut[:-1]}…"


def pad(text: str, width: int) -> str:
    """Pad `text` to `width` columns, cut to leave the last one free."""
    text = fit(text, width - 1)
    return text + " " * (width - _columns(text))


def _columns(text: str) -> int:
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def token_names(snapshot: Snapshot) -> Callable[[int], str]:
    """Return a function that names a token id: its quoted text, or its number without a tokenizer.json."""
    path = snapshot.tokenizer_file()
    if path is None:
        return str
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
    except ImportError:
        return str
    except Exception as error:  # the library raises plain Exception for files it cannot parse
        raise CacheError(
            f"{snapshot.store.path(TOKENIZER)} is not a tokenizer ({error}); run `dualkl cache verify` on"
            " the cache."
        ) from error

    def name(token: int) -> str:
        text = tokenizer.decode([token], skip_special_tokens=False)
        if not text or "\ufffd" in text:  # part of a character: use its vocabulary entry
            text = tokenizer.id_to_token(token) or str(token)
        return plain(json.dumps(text, ensure_ascii=False))

    return name
