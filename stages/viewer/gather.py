"""Collects what the page shows of runs and caches into plain values."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cache
from stages.runtime import history, rounds, traces
from stages.runtime.config import Config
from stages.runtime.cuts import cut_sentence, cut_share
from stages.runtime.schema import finite
from stages.runtime.version import own_version
from stages.viewer import figures, sample
from stages.viewer.columns import FINE_LAWS, LAWS
from stages.viewer.rollouts import Rollout, payload, prompt_of, tops_of
from stages.viewer.tokens import Speller

FORMAT = 1
ROWS = 200
MOST_BYTES = 2_800_000  # of the data block; page and scripts take the rest of 3 MB
MOST_HEAD_WORK = 6e10  # multiplications for teachers kept as hidden states: some two seconds of one core
HELDOUT_SHARE = 0.06  # of the rows: held-out prompts, each shown before, after and by the teacher
Found = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A run or a bare cache, read; `root` is its cache. `report`, `records`, ... are empty for a cache."""

    name: str
    root: str
    folder: Path | None = None
    config: Config | None = None
    report: Found = field(default_factory=dict)
    records: Sequence[Found] = ()
    evaluations: Found = field(default_factory=dict)


def page_data(sources: Sequence[Source], rows: int | None = None, serve: bool = False) -> Found:
    """The content of the page's data block.

    `rows`: rollouts of each source; by default ROWS over all of them, and fewer if they would make the page
    larger than MOST_BYTES.
    """
    count = max(1, ROWS // len(sources)) if rows is None else rows
    most_bytes = MOST_BYTES / len(sources) if rows is None else float("inf")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    runs = [one(source, count, most_bytes) for source in _named_apart(sources)]
    for run, source in zip(runs, sources, strict=True):
        run["compared"] = (
            [] if source is sources[0] else figures.compared(source.evaluations, sources[0].evaluations)
        )
    return {
        "format": FORMAT,
        "made": {"time": now, "version": own_version()},
        "serve": serve,
        "runs": runs,
    }


def _named_apart(sources: Sequence[Source]) -> list[Source]:
    """The sources, those of equal names named by their places: the page tells runs apart by name."""
    names = [source.name for source in sources]
    places = [str(source.folder or source.root) for source in sources]
    apart = [place if names.count(name) > 1 else name for name, place in zip(names, places, strict=True)]
    return [
        replace(source, name=f"{name} ({apart[:at].count(name) + 1})" if name in apart[:at] else name)
        for at, (source, name) in enumerate(zip(sources, apart, strict=True))
    ]


def one(source: Source, count: int, most_bytes: float) -> Found:
    """An element of `runs`, with up to `count` rollouts that take about `most_bytes` at most."""
    notes: list[str] = []
    say = notes.append
    snapshot, speller = _open(source.root, say)
    found: Found = _run(source) if source.folder is not None else {"kind": "cache"}
    found["cache"] = _cache_figures(snapshot, say)
    left = most_bytes - len(json.dumps(found))
    found["rollouts"] = _rollouts(source, snapshot, speller, count, left, say)
    if source.folder is None:
        found |= _cache_verdict(found["cache"])
        found["provenance"] = _fingerprint(snapshot)
    result: Found = finite({"name": source.name, **_EMPTY, **found, "notes": notes})
    return result


_EMPTY: Found = {
    "headline": "",
    "verdict": "",
    "about": "",
    "table": [],
    "curves": [],
    "steps": {"step": []},
    "marks": [],
    "evals": {"step": []},
    "gate": {},
    "seconds": [],
    "stage_one": {},
    "rounds": {},
    "memory": {},
    "config": {},
    "config_changes": [],
    "warnings": [],
    "answers": [],
    "prompts": None,
}


def _open(root: str, say: Callable[[str], None]) -> tuple[cache.Snapshot | None, Speller]:
    """The cache and its tokenizer; what is missing or damaged is said."""
    try:
        if not cache.exists(root):
            say(f"There is no cache at {root}: no rollouts are shown.")
            return None, Speller(None)
        snapshot = cache.open(root)
    except (cache.CacheError, OSError) as error:
        say(f"{error} No rollouts are shown.")
        return None, Speller(None)
    return snapshot, speller_of(snapshot, say)


def speller_of(snapshot: cache.Snapshot, say: Callable[[str], None]) -> Speller:
    """What spells the tokens of a cache: its tokenizer, or ids if that is missing or damaged, which is said."""
    try:
        path = snapshot.tokenizer_file()
    except (cache.CacheError, OSError) as error:
        say(f"{error} Tokens are shown as their ids.")
        return Speller(None)
    if path is None:
        say(f"{snapshot.root} has no tokenizer.json: tokens are shown as their ids.")
    return Speller(path)


def _run(source: Source) -> Found:
    report, records = source.report, source.records
    curves, columns = figures.steps(records)
    config = source.config.model_dump() if source.config else {}
    return {
        "kind": "run",
        "headline": report["headline"],
        "verdict": report["verdict"],
        "about": _about(config, report),
        "table": figures.table(source.evaluations),
        "curves": curves,
        "steps": columns,
        "marks": figures.marks(records),
        "evals": figures.evals(records),
        "gate": figures.gate(records, report["gate"], config.get("loss", {})),
        "seconds": figures.seconds(report),
        "stage_one": report["stage_one"],
        "rounds": figures.rounds(rounds.rounds_of(list(records))),
        "memory": figures.memory(records),
        "provenance": _provenance(source),
        "config": report["config"],
        "config_changes": figures.config_changes(records),
        "warnings": [
            {"step": r.get("step", 0), "text": r["text"]} for r in records if r["kind"] == "warning"
        ],
        "answers": _answers(source.evaluations),
        "prompts": max((found.get("answers") or 0 for found in source.evaluations.values()), default=0)
        or None,
    }


def _about(config: Found, report: Found) -> str:
    models = config.get("models", {})
    names = [Path(str(models.get(name) or "?")).name for name in ("student_model", "teacher_model")]
    run = report["run"]
    return f"{names[0]} learns from {names[1]}, {run['steps']:,} of {run['max_steps']:,} steps"


def _provenance(source: Source) -> list[Found]:
    assert source.config is not None
    newest = history.last_config(source.records) or {}
    versions = ", ".join(f"{name} {version}" for name, version in newest.get("versions", {}).items())
    known = {
        "command": newest.get("command"),
        "versions": versions,
        "commit": newest.get("commit"),
        "hardware": newest.get("hardware") or newest.get("device"),
        "processes": newest.get("processes"),
        "student": source.config.models.student_model,
        "teacher": source.config.models.teacher_model,
        "data": source.config.data.dataset,
        "trained student's policy": next(
            (r.get("policy_hash") for r in reversed(source.records) if r["kind"] == "export"), None
        ),
        "run": str(source.folder),
        "cache": source.root,
    }
    return [{"label": label, "value": str(value)} for label, value in known.items() if value]


def _fingerprint(snapshot: cache.Snapshot | None) -> list[Found]:
    if snapshot is None:
        return []
    fingerprint = snapshot.fingerprint
    known = {**fingerprint.must_match, **fingerprint.recorded, "cache": snapshot.root}
    return [{"label": name, "value": str(value)} for name, value in known.items()]


def _answers(evaluations: Found) -> list[Found]:
    """The same held-out prompts, answered at temperature 0 before and after training and by the teacher."""
    samples = {label: found.get("samples") or [] for label, found in evaluations.items()}
    rows = []
    for place in range(max(map(len, samples.values()), default=0)):
        own = {label: given[place] for label, given in samples.items() if place < len(given)}
        prompt = next(iter(own.values()))
        told = {
            label: {"text": s["completion"], "solved": s.get("solved"), "finish": s.get("finish")}
            for label, s in own.items()
        }
        rows.append({"prompt_id": prompt.get("prompt_id"), **prompt_of(prompt["prompt"]), **told})
    return rows


def _cache_figures(snapshot: cache.Snapshot | None, say: Callable[[str], None]) -> Found:
    if snapshot is None:
        return {}
    try:
        found = snapshot.summary()
    except (cache.CacheError, OSError) as error:
        say(str(error))
        return {}
    return {**found, "tokens": found["scored_tokens"], "cut_share": cut_share(found["finish_reasons"])}


def _cache_verdict(found: Found) -> Found:
    if not found.get("rows"):
        return {"headline": "A cache without rows"}
    rows, tokens = found["rows"], found["scored_tokens"]
    about = f"{found['bytes_per_token']:.1f} bytes a token; {cut_sentence(found['cut_share'])}."
    return {
        "headline": f"{rows:,} rollout{'s' * (rows != 1)} with {tokens:,} scored tokens",
        "verdict": about,
    }


def _rollouts(
    source: Source,
    snapshot: cache.Snapshot | None,
    speller: Speller,
    count: int,
    most_bytes: float,
    say: Callable[[str], None],
) -> Found:
    """The sampled rows with their tokens, and the sentence that says what was left out."""
    known = traces.newest_by_row(source.folder, say) if source.folder else {}
    rows, parts = ([], "") if snapshot is None else _sampled(snapshot, known, count, say)
    heldout = _heldout(source.folder, round(HELDOUT_SHARE * count), say) if source.folder else []
    laws, fine_bytes = FINE_LAWS, min(most_bytes, MOST_BYTES)
    while True:
        told = payload([*rows, *(row for prompt in heldout for row in prompt)], speller, laws)
        size = len(json.dumps(told))
        if laws is FINE_LAWS and size > fine_bytes:
            laws = LAWS
            continue
        if size <= most_bytes or len(rows) <= 1:
            break
        share = 0.95 * most_bytes / size
        rows, heldout = rows[: max(1, int(share * len(rows)))], heldout[: int(share * len(heldout))]
    total = 0 if snapshot is None else len(snapshot)
    how = "" if snapshot is None else _how(len(rows), total, parts)
    if laws is LAWS:
        how += " Figures of a token are rounded, to keep the page small; --serve or fewer --rows show 3 decimals."
    return {"shown": len(rows), "total": total, "how": how, "heldout": sum(map(len, heldout))} | told


def _sampled(
    snapshot: cache.Snapshot, known: dict[str, traces.Trace], count: int, say: Callable[[str], None]
) -> tuple[list[Rollout], str]:
    """Up to `count` rows, in an order whose every beginning has rows of each kind, and these kinds."""
    found = sample.scan(snapshot, say)
    row_ids = snapshot.row_ids
    places = {row_ids[position]: position for position in found.positions.tolist()}
    traced = sorted(places[row_id] for row_id in known.keys() & places.keys())
    chosen, kinds = sample.choose(found, count, traced)
    read = "" if len(found) == len(snapshot) else f" (of {len(found):,} rows that were read)"
    return _read(snapshot, chosen, known, "cache", say), kinds + read


def _how(shown: int, total: int, kinds: str) -> str:
    if shown == total:
        return f"All {total:,} rollouts of the cache." if total != 1 else "The cache's only rollout."
    drawn = f", about in these parts: {kinds}" if kinds else ""
    return (
        f"{shown:,} of {total:,} rollouts{drawn}. {total - shown:,} are left out; --rows N shows more,"
        " --serve all."
    )


def _read(
    snapshot: cache.Snapshot,
    positions: Sequence[int],
    known: dict[str, traces.Trace],
    source: str,
    say: Callable[[str], None],
) -> list[Rollout]:
    """Rows with the teacher's top five; those of a dense teacher only while MOST_HEAD_WORK lasts."""
    records, shown, work = list[cache.Record](), list[cache.Record](), 0.0
    for position in positions:
        try:
            records.append(snapshot[position])
        except (cache.CacheError, OSError) as error:
            say(f"{error} The page leaves this row out.")
            continue
        work += head_work(records[-1], snapshot)
        if work <= MOST_HEAD_WORK:
            shown.append(records[-1])
    if num_topless := len(records) - len(shown):
        say(
            f"The teacher's top five is left out for {num_topless:,} of {len(records):,} rollouts of"
            f" {snapshot.root}: from hidden states it takes seconds a rollout. Fewer --rows, or --serve, show it."
        )
    try:
        tops = tops_of(shown, functools.cache(snapshot.head))  # its digest is checked at every call
    except (cache.CacheError, OSError) as error:
        say(f"{error} The page leaves out the teacher's top five.")
        tops = []
    padded = [*tops, *[None] * (len(records) - len(tops))]
    return [
        Rollout(record, source, trace_of(record, known), top)
        for record, top in zip(records, padded, strict=True)
    ]


def head_work(record: cache.Record, snapshot: cache.Snapshot) -> float:
    """Multiplications that the teacher's top five take: T D V for hidden states, else 0."""
    states = getattr(record.signal, "states", None)
    return 0.0 if states is None else float(states.size) * snapshot.fingerprint.rules.vocab_size


def trace_of(record: cache.Record, known: dict[str, traces.Trace]) -> traces.Trace | None:
    trace = known.get(record.row_id)
    same = trace is not None and trace.token_ids.tolist() == record.completion_ids.tolist()
    return trace if same else None


def _heldout(folder: Path, count: int, say: Callable[[str], None]) -> list[list[Rollout]]:
    """Sampled completions of the same held-out prompts, before and after training and by the teacher."""
    names = {"before": "on_student_before", "after": "on_student_after", "teacher": "teacher_text"}
    opened: dict[str, tuple[cache.Snapshot, dict[str, int]]] = {}
    for label, name in names.items():
        root = folder / "eval" / name
        try:
            if root.is_dir() and not root.is_symlink() and cache.exists(str(root)):
                snapshot = cache.open(str(root))
                prompt_ids = snapshot.index["prompt_id"].to_pylist()
                opened[label] = snapshot, {prompt_id: place for place, prompt_id in enumerate(prompt_ids)}
        except (cache.CacheError, OSError) as error:
            say(f"{error} The page leaves out held-out text.")
    if not opened:
        return []
    shared = set.intersection(*({*places} for _, places in opened.values()))
    chosen = sorted(shared)[:count]
    read = [
        _read(snapshot, [places[prompt_id] for prompt_id in chosen], {}, label, say)
        for label, (snapshot, places) in opened.items()
    ]
    by_prompt: dict[str, list[Rollout]] = {}
    for row in (row for rows in read for row in rows):
        by_prompt.setdefault(row.record.prompt_id, []).append(row)
    return list(by_prompt.values())
