"""The gate's threshold over a run, and its log: in the loop, over processes, after a crash."""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import cache
from dualkl import DualKLOutput, TopKTeacher
from dualkl.thresholds import AdaptiveTau, adapt, divergence_histogram
from stages.data.batches import MicroBatch
from stages.loops import feed, gating, schedule, steps
from stages.runtime import checkpoint
from stages.runtime.checkpoint import Position
from stages.runtime.errors import UserError
from stages.runtime.run import Run, open_run
from tests.stages.loops.test_resume import assert_same_run, crash
from tests.support.helpers import Forker, make_config, records_of, small
from tests.support.thinning import leading
from tests.support.tiny_runs import TINY, step_run, student_of, train, train_from

ADAPTIVE: dict[str, Any] = {"tau_share": 0.6}


def taus(run: Run) -> list[float]:
    return [step["tau"] for step in records_of(run.folder, "step")]


def steps_of(run: Run, num_steps: int) -> list[tuple[list[DualKLOutput], list[Any]]]:
    """The outputs and inputs of each forward of the first steps, as the loop has them."""
    training = steps.prepare(run, student_of(run))
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    forward = training.module.forward
    found: list[tuple[list[DualKLOutput], list[Any]]] = []

    def noted(batch: Any) -> Any:
        loss, out = forward(batch)
        found[-1][0].append(out)
        found[-1][1].append(batch)
        return loss, out

    training.module.forward = noted
    with closing(
        feed.global_batches(run, training.student, snapshot, pool, range(num_steps), training.caps)
    ) as batches:
        for batch in batches:
            found.append(([], []))
            steps.train_step(run, training, pool, batch)
    return found


# The threshold of a step


def test_a_constant_threshold_is_that_of_every_step(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches(), tau=0.3)
    assert [[batch.tau for batch in inputs] for _, inputs in steps_of(run, 2)] == [[0.3], [0.3]]
    assert taus(run) == [0.3, 0.3]


def test_a_fixed_gate_has_no_threshold(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches(), gating=0.3)
    outputs, inputs = steps_of(run, 1)[0]
    assert [batch.tau for batch in inputs] == [None]
    step, gate = records_of(run.folder, "step")[0], records_of(run.folder, "gate")[0]
    assert step["gate"] == pytest.approx(0.3)
    assert step["rkl"] == pytest.approx(float(outputs[0].rkl.double().mean()))
    assert not {"tau", "rkl_below", "rkl_above"} & set(step)
    assert "tau" not in gate
    assert all("share_forward" not in row for row in gate["by_position"].values())


@pytest.mark.parametrize("gating_kind", leading(1, ["soft", "hard"]))
def test_an_adaptive_threshold_keeps_the_share(
    tmp_path: Path, caches: Callable[..., str], gating_kind: str
) -> None:
    """From far off, and while the divergences fall to a fraction."""
    run = train_from(
        tmp_path,
        caches(),
        batch_size=16,
        max_steps=14,
        refresh_every=0,
        gating=gating_kind,
        tau=5.0,
        **ADAPTIVE,
    )
    records = records_of(run.folder, "step")
    assert records[0]["gate"] > 0.95
    assert records[-1]["rkl"] < 0.5 * records[0]["rkl"]
    later = [step["gate"] for step in records[4:]]
    assert all(abs(share - 0.6) < 0.1 for share in later), later
    assert abs(sum(later) / len(later) - 0.6) < 0.05


def test_the_next_threshold_follows_from_the_steps_before(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches(), micro_batch_tokens=200, **ADAPTIVE)
    state = AdaptiveTau.starting_at(run.config.loss.tau)
    expected = []
    for outputs, inputs in steps_of(run, 3):
        expected.append(float(state.tau))
        assert {batch.tau for batch in inputs} == {expected[-1]}
        assert len(outputs) > 1
        histogram = divergence_histogram(torch.cat([out.rkl for out in outputs]))
        state = adapt(state, histogram, share=0.6, gating="soft", alpha=run.config.loss.alpha)
    assert taus(run) == expected
    assert len(set(expected)) == 3


@pytest.mark.thorough
def test_micro_batches_do_not_change_an_adaptive_threshold(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    """But by the rounding of divergences, which may move one into the next bin (a ratio of 1.07)."""
    found = []
    for number, split in enumerate([{}, {"grad_accum": 4}, {"micro_batch_tokens": 100}, {"packing": "off"}]):
        run = step_run(tmp_path / str(number), caches(), **ADAPTIVE, **split)
        steps_of(run, 3)
        found.append(taus(run))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3)


def save_steps(folder: Path, flags: list[str]) -> None:
    """In a process of its own: three steps, and this rank's state of the threshold to folder/RANK.pt."""
    run = open_run("", flags)
    training = steps.prepare(run, student_of(run))
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    for batch in feed.global_batches(run, training.student, snapshot, pool, range(3), training.caps):
        steps.train_step(run, training, pool, batch)
    assert training.adaptive is not None
    torch.save(training.adaptive.state(), folder / f"{run.world.rank}.pt")


@pytest.mark.thorough
def test_two_processes_have_the_threshold_and_the_figures_of_one(
    tmp_path: Path, forked: Forker, caches: Callable[..., str]
) -> None:
    """With idle forwards, which count for nothing."""
    runs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        values = TINY | ADAPTIVE | {"cache_dir": caches(), "batch_size": 16, "micro_batch_tokens": 100}
        forked.call(save_steps, folder, small(folder, **values), processes=processes).expect_success()
        runs.append(folder / "demo")
        states = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
        assert all(state == states[0] for state in states)
    one, two = ([records_of(run, kind) for kind in ("step", "gate")] for run in runs)
    assert [step["tau"] for step in two[0]] == pytest.approx([step["tau"] for step in one[0]], rel=1e-3)
    assert two[1][0]["by_position"].keys() == one[1][0]["by_position"].keys()
    for name, row in one[1][0]["by_position"].items():
        assert two[1][0]["by_position"][name] == pytest.approx(row, rel=1e-3, abs=1e-6)
    assert sum(two[1][0]["gate_histogram"]) == sum(one[1][0]["gate_histogram"]) == one[0][0]["tokens"]


@pytest.mark.thorough
def test_an_adaptive_run_resumes_bit_by_bit(tmp_path: Path) -> None:
    """Between checkpoints, before and after the refresh at step 3, and within a step."""
    values: dict[str, Any] = {**ADAPTIVE, "micro_batch_tokens": 120}
    expected = train(tmp_path / "whole", **values)
    assert len(set(taus(expected))) == 6
    for place in ("step 1", "between units", "step 5", "micro-step 12"):
        crash(tmp_path / place, place, **values)
        run = train(tmp_path / place, **values)
        assert_same_run(run, expected)
        assert taus(run) == taus(expected)
        positions = [
            checkpoint.read_position(max((r.folder / "checkpoints").glob("step-*"))) for r in (run, expected)
        ]
        assert positions[0].adaptive_tau == positions[1].adaptive_tau
        assert positions[0].adaptive_tau["num_updates"] == 6
        gates = [[r | {"time": 0} for r in records_of(one.folder, "gate")] for one in (run, expected)]
        assert gates[0] == gates[1]


def test_the_entropy_that_the_gate_looks_at_is_the_cached_one(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    """Of the whole vocabulary: the bucket of a top-4 teacher would hide a part of it."""
    root = caches(signal_k=4)
    records = {record.row_id: record for record in cache.open(root)[:]}
    tau = float(np.median(np.concatenate([record.teacher_entropy for record in records.values()])))
    run = step_run(tmp_path, root, signal_k=4, gate_on="teacher_entropy", tau=tau, alpha=100.0, packing="off")
    outputs, inputs = steps_of(run, 1)[0]
    pool, _ = schedule.open_pool(run, Position(0, 0))
    rows = feed.batch_rows(pool, run.config.run.seed, 0, 16)
    entropy = torch.from_numpy(np.concatenate([records[row].teacher_entropy for row in rows]))
    assert torch.equal(inputs[0].teacher_entropy, entropy)
    torch.testing.assert_close(outputs[0].gate, torch.sigmoid(100.0 * (tau - entropy)))
    above = float((entropy > tau).double().mean())
    assert 0.4 < above <= 0.5
    assert records_of(run.folder, "step")[0]["share_forward"] == pytest.approx(above, abs=0.01)
    counts = records_of(run.folder, "gate")[0]["divergence_histogram"]
    assert counts == coarse(divergence_histogram(entropy))


# What is logged


def coarse(histogram: torch.Tensor) -> list[int]:
    inner = histogram[1:-1].view(-1, 8).sum(1)
    return [int(histogram[0]), *inner.tolist(), int(histogram[-1])]


def in_bucket(values: np.ndarray, name: str) -> np.ndarray:
    low, _, high = name.rstrip("+").partition("-")
    return (values >= int(low)) & (values <= (int(high) if high else math.inf))


@dataclass
class Observed:
    """A step's records, and of its scored tokens, one after the other: what its forwards returned."""

    step: dict[str, Any]
    gate: dict[str, Any]
    outputs: list[DualKLOutput]
    inputs: list[MicroBatch]
    position: np.ndarray
    age: np.ndarray

    def column(self, name: str) -> np.ndarray:
        return torch.cat([getattr(out, name) for out in self.outputs]).double().numpy()


@pytest.fixture
def observed(tmp_path: Path, caches: Callable[..., str]) -> Observed:
    """The second step, over several forwards; half of the rows are of another run, ages differ."""
    values = {"signal_k": 4, "max_new_tokens": 48}
    run = step_run(tmp_path, caches(**values), **values, tau=0.02, micro_batch_tokens=400, packing="off")
    training = steps.prepare(run, student_of(run))
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    ages = {key: (-1, 0, 5, 30)[number % 4] for number, key in enumerate(pool.row_ids)}
    pool = replace(pool, ages=ages)
    forward, outputs, inputs = training.module.forward, [], []

    def noted(batch: Any) -> Any:
        loss, out = forward(batch)
        outputs.append(out)
        inputs.append(batch)
        return loss, out

    training.module.forward = noted
    batches = list(feed.global_batches(run, training.student, snapshot, pool, [0], training.caps))
    training.step = 4
    steps.train_step(run, training, pool, batches[0])
    assert len(outputs) > 1
    keys = [key for one in batches[0].forwards for key in one.row_ids]
    lengths = [pool.lengths[key][1] for key in keys]
    position = np.concatenate([np.arange(length) for length in lengths])
    age = np.repeat([ages[key] + 4 * (ages[key] >= 0) for key in keys], lengths)
    step, gate = (records_of(run.folder, kind)[0] for kind in ("step", "gate"))
    return Observed(step, gate, outputs, inputs, position, age)


def test_a_steps_record_holds_the_means_of_its_outputs(observed: Observed) -> None:
    step, rkl, fkl = observed.step, observed.column("rkl"), observed.column("fkl")
    assert step["step"] == observed.gate["step"] == 5
    above = rkl > 0.02
    for name, column in (("rkl", rkl), ("fkl", fkl)):
        assert step[name] == pytest.approx(column.mean())
        assert step[f"{name}_below"] == pytest.approx(column[~above].mean())
        assert step[f"{name}_above"] == pytest.approx(column[above].mean())
    assert step["gate"] == pytest.approx(observed.column("gate").mean())
    assert step["share_forward"] == pytest.approx(above.mean())
    assert step["tau"] == observed.gate["tau"] == 0.02
    student = torch.cat([1 - out.student_log_tail_mass.exp() for out in observed.outputs])
    teacher = torch.cat([1 - batch.teacher.log_tail_mass.exp() for batch in observed.inputs])
    assert step["student_support_mass"] == pytest.approx(float(student.mean()), abs=1e-6)
    assert step["teacher_support_mass"] == pytest.approx(float(teacher.mean()), abs=1e-6)
    assert step["share_floored"] == pytest.approx(observed.column("floored").mean())


def test_the_gates_record_holds_histograms_and_tables_of_its_outputs(observed: Observed) -> None:
    gate, position, age = observed.gate, observed.position, observed.age
    rkl, fkl, weight = (observed.column(name) for name in ("rkl", "fkl", "gate"))
    above = rkl > 0.02
    assert gate["gate_histogram"] == np.histogram(weight, 20, (0, 1))[0].tolist()
    assert gate["divergence_histogram"] == coarse(divergence_histogram(torch.from_numpy(rkl)))
    assert (gate["histogram_from"], gate["histogram_bins_per_decade"]) == (1e-6, 4)
    assert set(gate["by_position"]) == {"0-15", "16-63"}
    assert set(gate["by_age"]) == {"4-15", "16-63", "other runs"}
    rows = [("by_position", position, name) for name in gate["by_position"]]
    rows += [("by_age", age, name) for name in gate["by_age"]]
    for table, values_N, name in rows:
        here = values_N < 0 if name == "other runs" else in_bucket(values_N, name)
        found = gate[table][name]
        assert found.pop("tokens") == here.sum() > 0
        expected = {
            "gate": weight[here].mean(),
            "rkl": rkl[here].mean(),
            "fkl": fkl[here].mean(),
            "share_forward": above[here].mean(),
        }
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_record_of_dense_rows_has_no_kept_ids(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches(signal="hidden"), signal="hidden")
    steps_of(run, 1)
    step = records_of(run.folder, "step")[0]
    assert step["student_support_mass"] is None
    assert step["teacher_support_mass"] is None
    assert step["rkl"] > 0


def test_a_gate_record_is_small(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches())
    steps_of(run, 1)
    lines = [
        line for line in (run.folder / "metrics.jsonl").read_text().splitlines() if '"kind": "gate"' in line
    ]
    assert [len(line) < 2000 for line in lines] == [True]


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait_for_figures(tmp_path: Path) -> None:
    device, lengths = torch.device("cuda"), [20, 300]
    config = make_config(tmp_path, tau=0.5)
    pool = steps.Pool(["a", "b"], 0, {"a": 0, "b": -1}, {"a": (1, 20), "b": (1, 300)})
    rkl, fkl, gate, tail = torch.rand(4, 320, device=device)
    out = DualKLOutput(rkl.sum(), rkl, fkl, gate, gate > 0.9, None, -tail)
    teacher = TopKTeacher(torch.zeros(320, 1, device=device), torch.zeros(320, 1, device=device), -tail)
    batch: Any = SimpleNamespace(tau=0.5, teacher=teacher, teacher_entropy=None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        groups = gating.groups_of(pool, 5, ["a", "b"], lengths, device)
        found = gating.statistics_of(config, out, batch, groups)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    above = rkl.cpu() > 0.5
    table = gating.gate_record(found.cpu(), 0.5)["by_age"]
    assert {name: row["tokens"] for name, row in table.items()} == {"4-15": 20, "other runs": 300}
    assert table["other runs"]["share_forward"] == pytest.approx(float(above[20:].double().mean()), rel=1e-5)


# Settings


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (
            {"tau_share": 0.7, "gating": "fixed"},
            "tau_share 0.7 adapts the gate's threshold, but gating: 0.5 has none; use soft or hard",
        ),
        ({"tau_share": 0.7, "objective": "jsd", "gating": 0.5}, "tau_share 0.7 adapts"),
        ({"tau_share": 0.7, "alpha": 0}, "tau_share has no effect at alpha 0, where every λ is one half"),
        ({"tau_share": 1.0}, "loss.tau_share: input should be less than 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_a_sentence(
    tmp_path: Path, values: dict[str, Any], part: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_config(tmp_path, **values)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hard_gate_adapts_whatever_alpha_is(tmp_path: Path) -> None:
    assert make_config(tmp_path, tau_share=0.7, gating="hard", alpha=0).loss.tau_share == 0.7
