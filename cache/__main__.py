"""Look into caches: summarise, view, verify, export, prune and merge.

dualkl cache summary ROOT [--json]          rows, tokens, bytes, policies, quantiles
dualkl cache view ROOT [--first N] [--count N]   rows in row-id order, one per line
dualkl cache show ROOT [--row ID | --index N | --prompt ID | --worst N | --longest N] [--tokens]
                                            rollouts, token by token or as a table
dualkl cache verify ROOT [--repair]         check every digest and row; withdraw damaged ones
dualkl cache export ROOT OUT --to parquet   export all rows, decoded
dualkl cache prune ROOT (--max_age N --at_step N [--run_id ID] | --policy ID | --max_bytes N) [--dry_run]
                                            remove rows
dualkl cache merge ROOT SOURCE ...          add the rows of other caches
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache import selection
from cache.arguments import Parser, choice, nearest, whole
from cache.export import export
from cache.plain import plain
from cache.reader import Snapshot, open_cache
from cache.schema import CacheError
from cache.upkeep import merge, prune
from cache.verify import verify, withdraw
from cache.view import record_text, rows_text, summary_text

PROGRAM = "dualkl cache"
DAMAGED, WRONG_INPUT = 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Return the exit code: 0, 1 if `verify` finds faults, 2 for invalid input."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the terminal cannot display
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _arguments(sys.argv[1:] if arguments is None else arguments)
    except CacheError as error:
        print(plain(f"error: {error}"), file=sys.stderr)
        return WRONG_INPUT
    try:
        code = _COMMANDS[args.command][0](args)
        sys.stdout.flush()
        return code
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a root that is a file, a folder without write permission
        text = f"{error.filename or args.root}: {error.strerror or error}; fix that and rerun."
        if Path(args.root).is_file():
            text = f"{args.root} is a file; give the directory of a cache, which stage one writes."
        print(plain(f"error: {text}"), file=sys.stderr)
        return WRONG_INPUT


def _add_show(show: argparse.ArgumentParser) -> None:
    which = show.add_mutually_exclusive_group()
    which.add_argument("--row", metavar="ROW_ID", help="a row id or a unique prefix")
    which.add_argument("--index", type=whole, default=0, help="a row's number in row-id order (default 0)")
    which.add_argument(
        "--prompt", metavar="PROMPT_ID", help="all rows of a prompt: its id or a unique prefix"
    )
    worst = "the N rows with the largest sum over tokens of behaviour - teacher logprob"
    which.add_argument("--worst", type=whole, metavar="N", help=worst)
    which.add_argument("--longest", type=whole, metavar="N", help="the N rows with the most tokens")
    show.add_argument("--tokens", action="store_true", help="print several rows token by token too")


def _add_prune(old: argparse.ArgumentParser) -> None:
    rule = old.add_mutually_exclusive_group(required=True)
    rule.add_argument(
        "--max_age", type=whole, help="rows more optimizer steps old than this; needs --at_step"
    )
    rule.add_argument("--policy", action="append", default=[], help="rows of this policy; may be repeated")
    rule.add_argument("--max_bytes", type=whole, help="whole shards, oldest policy first, down to this size")
    old.add_argument("--at_step", type=whole, help="the step at which ages are counted")
    old.add_argument("--run_id", help="the run that counts these steps, if the cache has rows of several")
    old.add_argument("--dry_run", action="store_true", help="change nothing, only count")


def _arguments(words: list[str]) -> argparse.Namespace:
    """Parse a command line; CacheError with one sentence if it is wrong."""
    if not words:
        words = ["--help"]
    name = words[0]
    if not name.startswith("-") and name not in _COMMANDS:
        near = nearest(name, _COMMANDS)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(_COMMANDS)}."
        raise CacheError(f"unknown command {PROGRAM} {name}; {hint}")
    return _parser().parse(words)


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = {
        name: commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        for name, (_, text) in _COMMANDS.items()
    }
    for command in own.values():
        command.set_defaults(parser=command)
        command.add_argument("root", metavar="ROOT", help="directory or URL of the cache")
    own["summary"].add_argument("--json", action="store_true", help="the same figures for a program")
    for option, default, what in (
        ("--first", 0, "number of the first row"),
        ("--count", 20, "most rows to print"),
    ):
        own["view"].add_argument(
            option, type=whole, default=default, metavar="N", help=f"{what} (default {default})"
        )
    _add_show(own["show"])
    repair = "withdraw damaged shards, so that stage one refills their rows"
    own["verify"].add_argument("--repair", action="store_true", help=repair)
    own["export"].add_argument(
        "--to", type=choice("parquet"), metavar="parquet", required=True, help="the format of OUT"
    )
    own["export"].add_argument(
        "out", metavar="OUT", help="a new or empty folder, which appears when it is complete"
    )
    _add_prune(own["prune"])
    own["merge"].add_argument(
        "sources", nargs="+", metavar="SOURCE", help="caches to copy from; they do not change"
    )
    return parser


def _print(text: object = "") -> None:
    """Print `text` escaped; all output goes through here, so untrusted text cannot control the terminal.

    On a terminal a `Styled` line has its style, unless NO_COLOR is set (no-color.org).
    """
    escaped, style = plain(str(text), kept="\n"), getattr(text, "style", "")
    is_coloured = style and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[{style}m{escaped}\x1b[0m" if is_coloured else escaped)


def _summary(args: argparse.Namespace) -> int:
    summary = open_cache(args.root).summary()
    if args.json:
        text = json.dumps(summary, indent=1)
        print(text.replace("\x7f", "\\u007f"))  # the only control character that JSON does not escape
    else:
        _print(summary_text(summary))
    return 0


def _view(args: argparse.Namespace) -> int:
    snapshot = open_cache(args.root)
    positions = selection.page(snapshot, args.first, args.count)
    _print_table(snapshot, positions)
    first, end, total = positions[0], positions[-1] + 1, len(snapshot)
    if end < total:
        _print(f"rows {first:,} to {end - 1:,} of {total:,}; for more add --first {end}")
    return 0


def _print_table(snapshot: Snapshot, positions: list[int]) -> None:
    for line in rows_text(snapshot, positions, selection.shortest_ids(snapshot, positions)):
        _print(line)


def _show(args: argparse.Namespace) -> int:
    snapshot = open_cache(args.root)
    chosen = next(name for name in _SELECTED_BY if getattr(args, name) is not None)
    positions = _SELECTED_BY[chosen](snapshot, getattr(args, chosen))
    if len(positions) > 1:
        _print_table(snapshot, positions)
    for position in positions if args.tokens or len(positions) == 1 else []:
        if len(positions) > 1:
            _print()
        for line in record_text(snapshot, position):
            _print(line)
    return 0


def _export(args: argparse.Namespace) -> int:
    done = export(open_cache(args.root), args.out)
    files = f"{done.files:,} file{'s' * (done.files != 1)}"
    _print(f"{args.out}: {done.rows:,} rows in {files}, {done.bytes:,} bytes.")
    return 0


def _verify(args: argparse.Namespace) -> int:
    findings = verify(args.root)
    for finding in findings:
        _print(finding)
    if args.repair and (withdrawn := withdraw(args.root, findings)):
        for file in withdrawn:
            _print(f"withdrawn: {file}")
        _print(
            "To write the rows again, rerun stage one; a run that is training on them writes new ones at a"
            " refresh when it resumes."
        )
        findings = [finding for finding in findings if finding.record is None]
    if findings:
        _print(f"{len(findings)} fault{'s' * (len(findings) != 1)} in {args.root}.")
        return DAMAGED
    _print(f"{args.root} is sound: {len(open_cache(args.root)):,} rows.")
    return 0


def _prune(args: argparse.Namespace) -> int:
    rule = {name: getattr(args, name) for name in ("max_age", "at_step", "run_id", "max_bytes", "dry_run")}
    pruned = prune(args.root, policies=args.policy, **rule)
    what = f"{pruned.rows:,} rows ({pruned.scored_tokens:,} scored tokens, {pruned.num_bytes:,} bytes,"
    how = "would be removed" if args.dry_run else "removed"
    left = f"{args.root} holds {len(open_cache(args.root)):,} rows."
    _print(f"{what} {pruned.shards:,} whole shards) {how}; {left}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    merged = merge(args.root, args.sources)
    for text in merged.differences:
        _print(f"note: {text}")
    there = f", {merged.shards_there:,} were there already" if merged.shards_there else ""
    what = f"{merged.shards:,} shards ({merged.rows:,} rows, {merged.num_bytes:,} bytes) copied{there}"
    _print(f"{what}; {args.root} holds {len(open_cache(args.root)):,} rows.")
    return 0


_SELECTED_BY: dict[str, Callable[[Snapshot, Any], list[int]]] = {
    "row": selection.by_row,
    "prompt": selection.by_prompt,
    "worst": selection.worst,
    "longest": selection.longest,
    "index": selection.by_index,  # last, as it has a default
}
_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "summary": (_summary, "rows, tokens, bytes, policies, quantiles; reads no shard"),
    "view": (_view, "the rows in row-id order, one line each"),
    "show": (_show, "one rollout token by token, or several as a table"),
    "verify": (_verify, "check every digest and every row; exit code 1 if anything is wrong"),
    "export": (_export, "all rows, decoded, as Parquet"),
    "prune": (_prune, "remove rows by age, policy or size"),
    "merge": (_merge, "copy the rows of other caches, which must have the same fingerprint, into ROOT"),
}

if __name__ == "__main__":
    sys.exit(main())
