"""Objectives, refresh policies and signals on shared first caches: many small runs, packed on the cards.

    python -m bench.bakeoff --data .carry --workers 10 --cards 0 1 --minutes 8
    python -m bench.bakeoff --headline --tasks real --workers 4       one card, minutes
    python -m bench.bakeoff --headline --tasks demo --device cpu
    python -m bench.bakeoff --list
    python -m bench.bakeoff --table --page docs/results.md            from results in bench/results/bakeoff
    python -m bench.bakeoff --take cells.jsonl                        results that another machine sent
    python -m bench.bakeoff --rivals --tasks real --vllm /tmp/vllm_site       this project's run and TRL's

`--data` holds models/ and prompts/ (see ../shared/real/README.md), and arithmetic/ for that task. Every cell
is one JSON file; cells that are there are not run again. With `--journal FILE` each is also appended to one
file.

`--rivals` runs the contenders alone, one after the other on a card, since they are timed: this project's own
run of both stages, and TRL's DistillationTrainer for `--seconds` (docs/results.md says how). `--vllm` is the
folder into which vLLM was unpacked; without it those contenders need it installed.
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.bakeoff.tasks import TASKS, Job, Results, Start, headline, plan, rivals
from bench.bakeoff.worker import Place
from bench.measuring import ROOT


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.bakeoff",
    )
    parser.add_argument("--data", type=Path, default=ROOT / ".carry", help="folder of models and prompts")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "bakeoff", help="caches, logs"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/bakeoff")
    parser.add_argument("--journal", type=Path, help="file to which every finished cell is appended")
    parser.add_argument("--tasks", nargs="+", default=["real", "arithmetic"], choices=list(TASKS))
    parser.add_argument("--students", nargs="+", default=[], help="by default each task's main student")
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help="cells by name")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no cell that would end later")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cards", nargs="*", default=[], help="CUDA devices, taken in turn")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--set", nargs="+", metavar="SIZE=N", default=[], help="other sizes, e.g. steps=4")
    parser.add_argument("--headline", action="store_true", help="four objectives with one seed")
    parser.add_argument("--rivals", action="store_true", help="the contenders instead of the cells")
    parser.add_argument("--seconds", type=int, default=60, help="of TRL's training")
    parser.add_argument("--vllm", type=Path, help="folder of vLLM's packages")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true", help="print tables of the results, and draw them")
    parser.add_argument("--page", type=Path, help="with --table: also put the tables into this page")
    parser.add_argument("--take", type=Path, help="add the records of a journal")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    changed = {name: int(value) for name, _, value in (text.partition("=") for text in options.set)}
    vllm = options.vllm and options.vllm.resolve()
    _refuse_crowds(options)
    place = Place(options.data.resolve(), options.work.resolve(), options.device, options.tiny, changed, vllm)
    results = Results(options.out, place.sizes, options.journal)
    students = {
        task: [s for s in TASKS[task].students if s in options.students] or [TASKS[task].main_student]
        for task in options.tasks
    }

    def asked() -> Iterator[Job]:
        if options.rivals:
            return rivals(options.tasks, students, options.seconds)
        if options.headline:
            return headline(options.tasks, students)
        return plan(results, options.tasks, students)

    def jobs() -> Iterator[Job]:
        for job in asked():
            if any(fnmatch.fnmatch(job.name, pattern) for pattern in options.only):
                yield job

    if options.take:
        print(f"{results.take(options.take)} new records in {options.out}")
    elif options.list:
        seen = dict.fromkeys(job.name for job in jobs())
        print("\n".join(f"{'done' if results.get(name) else '    '}  {name}" for name in seen))
    elif options.table:
        from bench.bakeoff import table

        print(table.table(results))
        table.plots(results, options.out)
        if options.page:
            table.write(results, options.page)
    else:
        from bench.bakeoff.schedule import Schedule

        if not any(not isinstance(job, Start) for job in jobs()):
            raise SystemExit(f"no cell matches {' '.join(options.only)}; --list names them all.")
        Schedule(place, results, jobs, options.workers, options.cards, options.minutes).run()


def _refuse_crowds(options: argparse.Namespace) -> None:
    most = max(1, len(options.cards))
    if options.rivals and options.workers > most:
        raise SystemExit(f"--rivals times its runs, one on a card; give --workers {most}.")


if __name__ == "__main__":
    main()
