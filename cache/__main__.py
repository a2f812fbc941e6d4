"""`python -m cache summary|show|verify|prune|merge ROOT`: what a cache holds, whether it is sound, and its upkeep."""

from __future__ import annotations

import argparse
import json
import os
import sys

from cache.reader import Snapshot, open_cache
from cache.repair import withdraw
from cache.schema import CacheError
from cache.soundness import verify
from cache.upkeep import merge, prune
from cache.view import record_text, summary_text

DAMAGED, WRONG_INPUT = 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 if `verify` finds faults, 2 for wrong input."""
    args = _parser().parse_args(arguments)
    try:
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except CacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:  # a pager or `head` that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    summary = commands.add_parser("summary", help="rows, tokens, bytes, policies, quantiles; reads no shard")
    summary.add_argument("--json", action="store_true", help="the same figures for a program")
    show = commands.add_parser("show", help="one rollout: its text, and what student and teacher thought of each token")
    which = show.add_mutually_exclusive_group()
    which.add_argument("--row", metavar="ROW_ID", help="a row id, or enough of its beginning")
    which.add_argument("--index", type=int, default=0, help="a row's number in row-id order (default 0)")
    check = commands.add_parser("verify", help="check every digest and every row; exit code 1 if anything is wrong")
    check.add_argument(
        "--repair", action="store_true", help="withdraw damaged shards, so that stage one refills their rows"
    )
    old = commands.add_parser("prune", help="remove rows by age, policy or size")
    rule = old.add_mutually_exclusive_group(required=True)
    rule.add_argument("--max_age", type=int, help="rows more than this many optimizer steps old; needs --at_step")
    rule.add_argument("--policy", nargs="+", default=[], help="rows of these policies, as `summary` shows them")
    rule.add_argument("--max_bytes", type=int, help="whole shards, oldest policy first, until the cache is this small")
    old.add_argument("--at_step", type=int, help="the step at which ages are counted")
    old.add_argument("--run_id", help="the run whose steps these are, where the cache has rows of several")
    old.add_argument("--dry_run", action="store_true", help="change nothing, only count")
    union = commands.add_parser("merge", help="copy the rows of other caches, whose rows must mean the same, into ROOT")
    for command in (summary, show, check, old, union):
        command.add_argument("root", metavar="ROOT", help="directory or URL of the cache")
    union.add_argument("sources", nargs="+", metavar="SOURCE", help="caches to copy from; they stay as they are")
    return parser


def _summary(args: argparse.Namespace) -> int:
    summary = open_cache(args.root).summary()
    print(json.dumps(summary, indent=1) if args.json else summary_text(summary))
    return 0


def _show(args: argparse.Namespace) -> int:
    snapshot = open_cache(args.root)
    for line in record_text(snapshot, _position(snapshot, args)):
        print(line)
    return 0


def _position(snapshot: Snapshot, args: argparse.Namespace) -> int:
    if args.row is not None:
        found = [i for i, row_id in enumerate(snapshot.row_ids) if row_id.startswith(args.row)]
        if len(found) != 1:
            raise CacheError(
                f"{args.root}: {len(found)} rows begin with {args.row!r}; give the beginning of one row id."
            )
        return found[0]
    if not -len(snapshot) <= args.index < len(snapshot):
        raise CacheError(f"{args.root} has {len(snapshot)} committed rows; there is no row {args.index}.")
    return int(args.index) % len(snapshot)


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


def _prune(args: argparse.Namespace) -> int:
    pruned = prune(
        args.root, max_age=args.max_age, at_step=args.at_step, run_id=args.run_id, policies=args.policy,
        max_bytes=args.max_bytes, dry_run=args.dry_run,
    )  # fmt: skip
    what = f"{pruned.rows:,} rows ({pruned.scored_tokens:,} scored tokens, {pruned.num_bytes:,} bytes,"
    how = "would be removed" if args.dry_run else "removed"
    print(f"{what} {pruned.shards:,} whole shards) {how}; {args.root} holds {len(open_cache(args.root)):,} rows.")
    return 0


def _merge(args: argparse.Namespace) -> int:
    merged = merge(args.root, args.sources)
    for text in merged.differences:
        print(f"note: {text}")
    there = f", {merged.shards_there:,} were there already" if merged.shards_there else ""
    what = f"{merged.shards:,} shards ({merged.rows:,} rows, {merged.num_bytes:,} bytes) copied{there}"
    print(f"{what}; {args.root} holds {len(open_cache(args.root)):,} rows.")
    return 0


_COMMANDS = {"summary": _summary, "show": _show, "verify": _verify, "prune": _prune, "merge": _merge}

if __name__ == "__main__":
    sys.exit(main())
