"""A cache from the command line: what it holds, single rollouts, whether it is sound, and copies for other tools.

python -m cache summary ROOT                         rows, tokens, bytes, policies, quantiles
python -m cache show ROOT [--row|--index|--prompt|--worst|--longest ...]    rollouts, token by token or as a table
python -m cache verify ROOT                          every digest and every row; --repair withdraws what is damaged
python -m cache export --to parquet|datasets ROOT OUT    all rows, decoded
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from cache import selection
from cache.export import FORMS, export
from cache.reader import Snapshot, open_cache
from cache.repair import withdraw
from cache.schema import CacheError
from cache.soundness import verify
from cache.view import record_text, rows_text, summary_text

DAMAGED, WRONG_INPUT = 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 if `verify` finds faults, 2 for wrong input."""
    args = _parser().parse_args(arguments)
    try:
        code = {"summary": _summary, "show": _show, "verify": _verify, "export": _export}[args.command](args)
        sys.stdout.flush()
        return code
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:  # a pager or `head` that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cache", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    summary = commands.add_parser("summary", help="rows, tokens, bytes, policies, quantiles; reads no shard")
    summary.add_argument("--json", action="store_true", help="the same figures for a program")
    show = commands.add_parser("show", help="one rollout token by token, or several as a table")
    which = show.add_mutually_exclusive_group()
    which.add_argument("--row", metavar="ROW_ID", help="a row id, or enough of its beginning")
    which.add_argument("--index", type=int, default=0, help="a row's number in row-id order (default 0)")
    which.add_argument("--prompt", metavar="PROMPT_ID", help="all rows of a prompt: its id, or enough of its beginning")
    which.add_argument(
        "--worst", type=int, metavar="N", help="the N rows that the student likes most and the teacher least:"
        " the largest sum over tokens of behaviour - teacher logprob",
    )  # fmt: skip
    which.add_argument("--longest", type=int, metavar="N", help="the N rows of the most tokens")
    show.add_argument("--tokens", action="store_true", help="of several rows, print each token by token too")
    check = commands.add_parser("verify", help="check every digest and every row; exit code 1 if anything is wrong")
    check.add_argument(
        "--repair", action="store_true", help="withdraw damaged shards, so that stage one refills their rows"
    )
    copy = commands.add_parser("export", help="all rows, decoded, as Parquet or for datasets.load_from_disk")
    copy.add_argument("--to", choices=list(FORMS), required=True, help="the format of OUT")
    for command in (summary, show, check, copy):
        command.add_argument("root", metavar="ROOT", help="directory of the cache")
    copy.add_argument("out", metavar="OUT", help="a new or empty folder, which appears when it is complete")
    return parser


def _summary(args: argparse.Namespace) -> int:
    summary = open_cache(args.root).summary()
    print(json.dumps(summary, indent=1) if args.json else summary_text(summary))
    return 0


def _show(args: argparse.Namespace) -> int:
    snapshot = open_cache(args.root)
    positions = _selected(snapshot, args)
    if len(positions) > 1:
        for line in rows_text(snapshot, positions, selection.shortest_ids(snapshot, positions)):
            print(line)
    for position in positions if args.tokens or len(positions) == 1 else []:
        if len(positions) > 1:
            print()
        for line in record_text(snapshot, position):
            print(line)
    return 0


def _selected(snapshot: Snapshot, args: argparse.Namespace) -> list[int]:
    """The numbers of the rows that the options of `show` name."""
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
    done = export(open_cache(args.root), args.to, args.out)
    files = f"{done.files:,} file{'s' * (done.files != 1)}"
    print(f"{args.out}: {done.rows:,} rows in {files}, {done.bytes:,} bytes.")
    return 0


def _verify(args: argparse.Namespace) -> int:
    findings = verify(args.root)
    for finding in findings:
        print(finding)
    if args.repair and (withdrawn := withdraw(args.root, findings)):
        for name in withdrawn:
            print(f"withdrawn: commits/{name}; rerun stage one, which writes its rows again.")
        findings = [finding for finding in findings if finding.record is None]
    if findings:
        print(f"{len(findings)} fault{'s' * (len(findings) != 1)} in {args.root}.")
        return DAMAGED
    print(f"{args.root} is sound: {len(open_cache(args.root)):,} rows.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
