"""The bake-off's intervals, tables and page, on records made by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.bakeoff import race, table
from bench.bakeoff.intervals import Interval, bootstrap, over_seeds
from bench.bakeoff.schedule import Schedule
from bench.bakeoff.tasks import HORIZON, HORIZON_LONGER, TINY, Cell, Results, Rival, Start, plan, rivals
from bench.bakeoff.worker import Place

LR = 1e-3


def measured(kl: float, **others: Any) -> dict[str, Any]:
    side = {"forward_kl": kl, "reverse_kl": kl, "jsd": kl / 4, "top1_agreement": 0.9}
    style = {"completion_tokens": 20.0, "cut_share": 0.25, "distinct_4grams": 0.8}
    return {"on_student": side, "on_teacher": side, "style": style, **others}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "records", lambda task: TINY)


def put(results: Results, job: Cell | Start | Rival, **record: Any) -> None:
    results.put(job.name, {"cell": asdict(job), "sizes": asdict(TINY), **record})


def put_cell(results: Results, cell: Cell, kl: float, seconds: float = 8.0, **others: Any) -> None:
    put(
        results,
        cell,
        after=measured(kl, **others),
        seconds={"train": seconds / 2, "refresh": seconds / 2},
        mean_gate=0.7,
        refreshes=3,
        trained_tokens=5000,
        curve=[],
    )


def rows_of(text: str, title: str) -> list[list[str]]:
    part = text.split(f"**{title}**")[1].split("**")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if "|" in line][2:]


def test_t_interval_is_that_of_the_formula() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.high) == (2.0, pytest.approx(2.0 + 4.303 / 3**0.5))
    assert over_seeds([1.0]).text() == "1.0000"


def test_a_difference_is_noise_if_its_interval_contains_0_or_is_unknown() -> None:
    assert Interval(0.1, -0.1, 0.3).is_noise
    assert Interval(0.1).is_noise
    assert not Interval(0.2, 0.1, 0.3).is_noise
    assert Interval(0.2, 0.1, 0.3).difference(2) == "+0.20 ± 0.10"
    assert Interval(-0.1, -0.3, 0.1).difference(2) == "-0.10 ± 0.20 ~"


def test_bootstrap_has_the_width_of_the_normal_interval_over_problems() -> None:
    values_SP = (np.arange(400) % 4 == 0)[None].astype(float)
    found = bootstrap(values_SP)
    assert found.low is not None
    assert found.high is not None
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert found.mean == 0.25
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_bootstrap_covers_the_spread_of_seeds() -> None:
    far_apart = bootstrap(np.array([[0.0] * 50, [1.0] * 50]))
    assert (far_apart.low, far_apart.high) == (0.0, 1.0)


def test_differences_are_paired_by_seed_and_noise_is_marked(results: Results) -> None:
    for seed, offset in enumerate((0.0, 0.5, 1.0)):  # seeds differ by more than arms do
        put_cell(results, Cell("demo", "demo", "reverse", LR, seed), 1.0 + offset)
        put_cell(results, Cell("demo", "demo", "soft", LR, seed), 0.9 + offset + 0.001 * seed)
        put_cell(results, Cell("demo", "demo", "jsd", LR, seed), 1.0 + offset + 0.1 * (seed - 1))
    rows = {row[0]: row for row in rows_of(table.table(results), "Differences, paired by seed")}
    assert rows["soft.lr0.001"][1:4] == ["reverse", "3", "-0.0990 ± 0.0025"]
    assert rows["jsd.lr0.001"][3].endswith(" ~")


def test_answers_have_pass_at_k_and_intervals_over_problems(results: Results) -> None:
    problems = {"samples": 4, "avg": 0.5}
    put_cell(results, Cell("demo", "demo", "reverse", LR, 0), 1.0, solved=[0, 2, 2, 4] * 25, **problems)
    put_cell(results, Cell("demo", "demo", "soft", LR, 0), 1.0, solved=[1, 3, 3, 4] * 25, **problems)
    rows = {row[0]: row for row in rows_of(table.table(results), "Answers")}
    soft, reverse = rows["soft.lr0.001"], rows["reverse.lr0.001"]
    assert float(reverse[2].split()[0]) == pytest.approx(0.5)
    assert float(reverse[3].split()[0]) == pytest.approx((0 + 2 * 5 / 6 + 1) / 4, abs=5e-4)
    assert soft[5].startswith("+0.188 ±")
    assert not soft[5].endswith("~")


def test_refreshes_are_compared_with_one_at_every_step(results: Results) -> None:
    for seed in (0, 1):
        cell = Cell("demo", "demo", "soft", LR, seed)
        put(results, Start("demo", "demo", seed), before=measured(2.0), bytes_per_token=9.0)
        put_cell(results, replace(cell, refresh="1"), 1.0, seconds=40.0)
        put_cell(results, cell, 1.2, seconds=10.0)
    rows = rows_of(table.table(results), "Two stages against online")
    row = next(row for row in rows if row[1] == "the task's")
    assert (row[5], row[7]) == ("0.800 ± 0.000", "0.25 ± 0.00")


def test_signals_are_told_for_arms_that_have_several(results: Results) -> None:
    small = Cell("demo", "demo", "soft", LR, 0, signal="topk-8")
    put(results, Start("demo", "demo", 0, "topk-8"), bytes_per_token=30.4)
    for cell in (small, Cell("demo", "demo", "soft", LR, 0), Cell("demo", "demo", "jsd", LR, 0)):
        put_cell(results, cell, 1.0)
    rows = rows_of(table.table(results), "Signals")
    assert [row[:3] for row in rows] == [["soft", "topk-8", "30"], ["soft", "topk-64", "–"]]


def test_horizons_have_cells_at_equal_steps_and_at_equal_tokens(results: Results) -> None:
    asked = [job for job in plan(results, ["demo"], {"demo": ["demo"]}) if isinstance(job, Cell)]
    grown = {cell.longer for cell in asked if cell.horizon == HORIZON}
    assert grown == {1.0, HORIZON_LONGER}
    for cell in (c for c in asked if c.arm == "soft" and c.seed == 0 and c.lr == LR):
        put_cell(results, cell, 1.0)
    rows = rows_of(table.table(results), "Horizon")
    assert {(row[1], row[2]) for row in rows} == {("full", "1"), ("25% → 100 %", "1"), ("25% → 100 %", "1.5")}


def put_race(results: Results) -> None:
    put(results, Start("demo", "demo", 0), before=measured(2.0))
    lines = {"ours-soft": [(10.0, 1.0), (20.0, 0.5)], "trl": [(30.0, 1.5), (60.0, 0.75)]}
    for name, line in lines.items():
        points = [{"seconds": s, "step": int(s), **measured(kl)} for s, kl in line]
        put(
            results,
            Rival("demo", "demo", name, LR, 0),
            points=points,
            after=measured(line[-1][1]),
            phases={"generate": 4.0, "total": 10.0},
            rows_per_step=8,
        )


def test_a_race_tells_when_the_other_s_final_quality_was_reached(results: Results) -> None:
    put_race(results)
    rows = {row[0]: row for row in rows_of(table.table(results), "Against TRL, by seconds")}
    ours = rows["this project, gate on R, soft, lr 0.001"]
    assert ours[8] == "15.0 (4.0 ×)"  # 0.75 lies halfway between the points at 10 and 20 seconds
    assert ours[4] == "8.0"
    assert ours[-1] == "generate 4.0, rest 6.0"


def test_seconds_to_a_quality_that_is_never_reached_are_none() -> None:
    assert race.seconds_to([(0.0, 2.0), (10.0, 1.0)], 0.5) is None
    assert race.seconds_to([(0.0, 2.0), (10.0, 1.0)], 3.0) == 0.0


def test_rivals_come_in_order_of_value_with_all_contenders_first() -> None:
    jobs = list(rivals(["demo"], {"demo": ["demo"]}, 60))
    assert [job.contender for job in jobs[:3]] == ["ours-reverse", "trl", "trl-vllm"]
    assert len({job.name for job in jobs}) == len(jobs)
    assert jobs[0].cell == Cell("demo", "demo", "reverse", LR, 0)


def test_a_run_for_all_of_the_time_takes_its_steps_from_the_pilot_s_speed(
    results: Results, tmp_path: Path
) -> None:
    long = Rival("demo", "demo", "ours-reverse-long", LR, 0)
    assert long.pilot == Rival("demo", "demo", "ours-reverse", LR, 0)
    place = Place(tmp_path, tmp_path, "cpu", tiny=True)
    schedule = Schedule(place, results, lambda: [long], 1, [], 1.0)
    first = schedule._next(None)
    assert first == Start("demo", "demo", 0)
    schedule.made.add(first.name)
    assert schedule._next(None) == long.pilot
    put(results, long.pilot, points=[{"seconds": 20.0}])
    assert schedule._next(None) == long
    assert schedule._known(long) == (None, 3.0)


def test_the_page_gets_its_tables_between_the_marks(results: Results, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- bake-off -->\nold\n<!-- /bake-off -->\nafter\n")
    put_race(results)
    table.write(results, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- bake-off -->\n### demo, student demo")
    assert text.endswith("<!-- /bake-off -->\nafter\n")
    assert "old" not in text
