"""Command line for caches: summarise, view, verify, export, prune and merge.

python -m cache summary ROOT                            rows, tokens, bytes, policies, quantiles
python -m cache view ROOT [--first N] [--count N]       rows in row-id order, one per line
python -m cache show ROOT [--row|--prompt|--worst ...]  rollouts, token by token or as a table
python -m cache verify ROOT [--repair]                  check every digest and row; withdraw damaged ones
python -m cache export --to parquet ROOT OUT            export all rows, decoded
python -m cache prune ROOT --max_age|--policy|--max_bytes ...   remove rows
python -m cache merge ROOT SOURCE ...                   add the rows of other caches
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys

from cache import selection
from cache.export import export
from cache.plain import plain
from cache.reader import Snapshot, open_cache
from cache.schema import CacheError
from cache.upkeep import merge, prune
from cache.verify import verify, withdraw
from cache.view import record_text, rows_text, summary_text

DAMAGED, WRONG_INPUT = 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Return the exit code: 0, 1 if `verify` finds faults, 2 for invalid input."""
    args = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the terminal cannot display
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a root that is a file, a folder without write permission
        text = f"error: {error.filename or args.root}: {error.strerror or error}; mend that and rerun."
        print(plain(text), file=sys.stderr)
        return WRONG_INPUT


def _add_show(show: argparse.ArgumentParser) -> None:
    which = show.add_mutually_exclusive_group()
    which.add_argument("--row", metavar="ROW_ID", help="a row id, or enough of its beginning")
    which.add_argument("--index", type=int, default=0, help="a row's number in row-id order (default 0)")
    which.add_argument(
        "--prompt", metavar="PROMPT_ID", help="all rows of a prompt: its id, or enough of its beginning"
    )
    which.add_argument(
        "--worst",
        type=int,
        metavar="N",
        help="the N rows that the student likes most and the teacher least:"
        " the largest sum over tokens of behaviour - teacher logprob",
    )
    which.add_argument("--longest", type=int, metavar="N", help="the N rows of the most tokens")
    show.add_argument("--tokens", action="store_true", help="of several rows, print each token by token too")


def _add_prune(old: argparse.ArgumentParser) -> None:
    rule = old.add_mutually_exclusive_group(required=True)
    rule.add_argument(
        "--max_age", type=int, help="rows more than this many optimizer steps old; needs --at_step"
    )
    rule.add_argument(
        "--policy", action="append", default=[], help="rows of this policy (give it again for more)"
    )
    rule.add_argument(
        "--max_bytes", type=int, help="whole shards, oldest policy first, until the cache is this small"
    )
    old.add_argument("--at_step", type=int, help="the step at which ages are counted")
    old.add_argument("--run_id", help="the run whose steps these are, where the cache has rows of several")
    old.add_argument("--dry_run", action="store_true", help="change nothing, only count")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cache", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    summary = commands.add_parser("summary", help="rows, tokens, bytes, policies, quantiles; reads no shard")
    summary.add_argument("--json", action="store_true", help="the same figures for a program")
    page = commands.add_parser("view", help="the rows in row-id order, one line each")
    page.add_argument("--first", type=int, default=0, metavar="N", help="number of the first row (default 0)")
    page.add_argument("--count", type=int, default=20, metavar="N", help="at most so many rows (default 20)")
    show = commands.add_parser("show", help="one rollout token by token, or several as a table")
    _add_show(show)
    check = commands.add_parser(
        "verify", help="check every digest and every row; exit code 1 if anything is wrong"
    )
    check.add_argument(
        "--repair", action="store_true", help="withdraw damaged shards, so that stage one refills their rows"
    )
    copy = commands.add_parser("export", help="all rows, decoded, as Parquet")
    copy.add_argument("--to", choices=["parquet"], required=True, help="the format of OUT")
    old = commands.add_parser("prune", help="remove rows by age, policy or size")
    _add_prune(old)
    union = commands.add_parser(
        "merge", help="copy the rows of other caches, whose rows must mean the same, into ROOT"
    )
    for command in (summary, page, show, check, copy, old, union):
        command.add_argument("root", metavar="ROOT", help="directory or URL of the cache")
    copy.add_argument("out", metavar="OUT", help="a new or empty folder, which appears when it is complete")
    union.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="caches to copy from; they stay as they are"
    )
    return parser


def _print(text: object = "") -> None:
    """Print `text` escaped; all output goes through here, so untrusted text cannot control the terminal."""
    print(plain(str(text), kept="\n"))


def _summary(args: argparse.Namespace) -> int:
    summary = open_cache(args.root).summary()
    if args.json:
        print(
            json.dumps(summary, indent=1).replace("\x7f", "\\u007f")
        )  # the only control character that JSON does not escape
    else:
        _print(summary_text(summary))
    return 0


def _view(args: argparse.Namespace) -> int:
    snapshot = open_cache(args.root)
    positions = selection.page(snapshot, args.first, args.count)
    _print_table(snapshot, positions)
    if positions[-1] + 1 < len(snapshot):
        _print(
            f"rows {positions[0]:,} to {positions[-1]:,} of {len(snapshot):,}; go on with --first"
            f" {positions[-1] + 1}"
        )
    return 0


def _print_table(snapshot: Snapshot, positions: list[int]) -> None:
    for line in rows_text(snapshot, positions, selection.shortest_ids(snapshot, positions)):
        _print(line)


def _show(args: argparse.Namespace) -> int:
    snapshot = open_cache(args.root)
    positions = _selected(snapshot, args)
    if len(positions) > 1:
        _print_table(snapshot, positions)
    for position in positions if args.tokens or len(positions) == 1 else []:
        if len(positions) > 1:
            _print()
        for line in record_text(snapshot, position):
            _print(line)
    return 0


def _selected(snapshot: Snapshot, args: argparse.Namespace) -> list[int]:
    """Return the row numbers selected by the options of `show`."""
    if args.row is not None:
        return selection.by_row(snapshot, args.row)
    if args.prompt is not None:
        return selection.by_prompt(snapshot, args.prompt)
    if args.worst is not None:
        return selection.worst(snapshot, args.worst)
    if args.longest is not None:
        return selection.longest(snapshot, args.longest)
    return selection.by_index(snapshot, args.index)


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
            "Stage one, run again, writes rows of a run that has not trained; a run that trains on them"
            " refreshes when it goes on."
        )
        findings = [finding for finding in findings if finding.record is None]
    if findings:
        _print(f"{len(findings)} fault{'s' * (len(findings) != 1)} in {args.root}.")
        return DAMAGED
    _print(f"{args.root} is sound: {len(open_cache(args.root)):,} rows.")
    return 0


def _prune(args: argparse.Namespace) -> int:
    pruned = prune(
        args.root,
        max_age=args.max_age,
        at_step=args.at_step,
        run_id=args.run_id,
        policies=args.policy,
        max_bytes=args.max_bytes,
        dry_run=args.dry_run,
    )
    what = f"{pruned.rows:,} rows ({pruned.scored_tokens:,} scored tokens, {pruned.num_bytes:,} bytes,"
    how = "would be removed" if args.dry_run else "removed"
    _print(
        f"{what} {pruned.shards:,} whole shards) {how}; {args.root} holds {len(open_cache(args.root)):,}"
        " rows."
    )
    return 0


def _merge(args: argparse.Namespace) -> int:
    merged = merge(args.root, args.sources)
    for text in merged.differences:
        _print(f"note: {text}")
    there = f", {merged.shards_there:,} were there already" if merged.shards_there else ""
    what = f"{merged.shards:,} shards ({merged.rows:,} rows, {merged.num_bytes:,} bytes) copied{there}"
    _print(f"{what}; {args.root} holds {len(open_cache(args.root)):,} rows.")
    return 0


_COMMANDS = {
    "summary": _summary,
    "view": _view,
    "show": _show,
    "verify": _verify,
    "export": _export,
    "prune": _prune,
    "merge": _merge,
}

if __name__ == "__main__":
    sys.exit(main())
