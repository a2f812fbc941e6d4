"""Stage two: the gradient and the loss of a step however it is cut, training, and what stops a run."""

import copy
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

import cache
from dualkl import Head
from stages import evaluate
from stages import train as stage_two
from stages.data.alignment import Aligned, align
from stages.data.batches import to_tensors
from stages.loops import feed, fit, schedule, setup
from stages.loops.budgets import train_caps
from stages.models.student import Student
from stages.runtime import checkpoint
from stages.runtime.checkpoint import Position
from stages.runtime.errors import UserError
from stages.runtime.run import Run, open_run
from tests import reference
from tests.helpers import Forker, assert_same_weights, make_run, records_of, small, weights_in
from tests.tiny_runs import TINY, step_run, stir, student_of, train, train_from, write_rollouts

V = 230


# The gradient of a step


def gradient(run: Run) -> dict[str, torch.Tensor]:
    """The gradient that `train_step` hands to the optimizer for the first batch."""
    student = student_of(run)
    stir(student)
    training = fit.prepare(run, student)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    found: dict[str, torch.Tensor] = {}

    def keep(training: fit.Training, max_grad_norm: float, sums: torch.Tensor) -> tuple[list[float], float]:
        found.update({name: p.grad.clone() for name, p in training.student.trainable.items() if p.grad is not None})
        training.step += 1
        return sums.tolist(), 1.0

    original, fit._update = fit._update, keep
    try:
        fit.train_step(run, training, pool, batch(run, training, snapshot, pool, 0))
    finally:
        fit._update = original
    return found


def batch(run: Run, training: fit.Training, snapshot: cache.Snapshot, pool: fit.Pool, index: int) -> fit.Batch:
    return next(feed.global_batches(run, training.student, snapshot, pool, [index], training.caps))


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|found - expected| / |expected| over all parameters together."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    return math.sqrt(difference / sum(float(tensor.double().square().sum()) for tensor in expected.values()))


@pytest.fixture(scope="module")
def whole_gradient(caches: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Of a step of 16 rows in one padded forward."""
    return gradient(step_run(tmp_path_factory.mktemp("whole"), caches(), packing="off"))


SPLITS: list[dict[str, Any]] = [
    {"grad_accum": 4}, {"grad_accum": 16}, {"lp_micro_batch": 3}, {"micro_batch_tokens": 130}, {"micro_batch_tokens": 1},
    {"grad_accum": 2, "lp_micro_batch": 5, "micro_batch_tokens": 200}, {"gradient_checkpointing": "true"},
]  # fmt: skip


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("split", [{}, *SPLITS], ids=str)
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(
    tmp_path: Path, caches: Callable[..., str], whole_gradient: dict[str, torch.Tensor], split: dict[str, Any],
    packing: str,
) -> None:  # fmt: skip
    found = gradient(step_run(tmp_path, caches(), packing=packing, **split))
    assert len(found) > 50
    assert relative_error(found, whole_gradient) < 1e-5


def save_gradient(folder: Path, flags: list[str]) -> None:
    """In a process of its own: this rank's gradient, to folder/RANK.pt."""
    run = open_run("", flags)
    torch.save(gradient(run), folder / f"{run.world.rank}.pt")


RANKS: list[tuple[int, dict[str, Any]]] = [
    (2, {}), (2, {"grad_accum": 4}), (2, {"micro_batch_tokens": 100}), (2, {"packing": "off", "micro_batch_tokens": 200}),
    (4, {"micro_batch_tokens": 100}),
]  # fmt: skip


@pytest.mark.parametrize(("processes", "split"), RANKS, ids=str)
def test_several_processes_have_the_gradient_of_one(
    tmp_path: Path, forked: Forker, caches: Callable[..., str], whole_gradient: dict[str, torch.Tensor],
    processes: int, split: dict[str, Any],
) -> None:  # fmt: skip
    """Under micro_batch_tokens the ranks need different numbers of forwards; the one short of work runs idle ones."""
    arguments = small(tmp_path, **(TINY | {"cache_dir": caches(), "batch_size": 16} | split))
    forked.call(save_gradient, tmp_path, arguments, processes=processes).expect_success()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for other in ranks[1:]:
        assert_same_weights(other, ranks[0])
    assert relative_error(ranks[0], whole_gradient) < 1e-5


def test_full_fine_tuning_on_two_processes_has_the_gradient_of_one(
    tmp_path: Path, forked: Forker, caches: Callable[..., str]
) -> None:
    arguments = small(tmp_path, **(TINY | {"cache_dir": caches(), "batch_size": 16, "use_lora": "false"}))
    forked.call(save_gradient, tmp_path, arguments, processes=2).expect_success()
    expected = gradient(open_run("", arguments))
    assert "model.embed_tokens.weight" in expected
    assert relative_error(torch.load(tmp_path / "1.pt"), expected) < 1e-5


def save_weights(folder: Path, flags: list[str]) -> None:
    """In a process of its own: both stages, and this rank's trained weights to folder/RANK.pt."""
    run = open_run("", flags)
    student = student_of(run)
    write_rollouts(run, student)
    stage_two.train(run, student, setup.shared_vocabulary(run.config))
    torch.save({n: p.detach().clone() for n, p in student.trainable.items()}, folder / f"{run.world.rank}.pt")


def test_two_processes_train_the_student_of_one(tmp_path: Path, forked: Forker) -> None:
    """Up to a refresh: after it the last bits of the weights, in the policy's hash, seed other rollouts.

    Gradients agree to 1e-5 (above); AdamW's first steps divide by them, which magnifies the rounding of small ones.
    """
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        arguments = small(folder, **(TINY | {"max_steps": 3, "refresh_every": 0}))
        forked.call(save_weights, folder, arguments, processes=processes).expect_success()
        found[processes] = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
    assert_same_weights(*found[2])
    assert relative_error(found[2][0], found[1][0]) < 1e-4


def test_every_rank_knows_how_many_forwards_the_longest_has(tmp_path: Path, caches: Callable[..., str]) -> None:
    """And all tokens of the step, with no word from the others; a rank short of work ends with idle forwards."""
    run = step_run(tmp_path, caches(), micro_batch_tokens=100)
    student = student_of(run)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    lengths = {row_id: (10, 80 if i % 5 == 0 else 10) for i, row_id in enumerate(pool.row_ids)}
    pool = replace(pool, lengths=lengths)
    batches = []
    for rank in range(4):
        here = replace(run, world=replace(run.world, rank=rank, size=4))
        batches.append(next(feed.global_batches(here, student, snapshot, pool, [0], train_caps(run.config, None))))
    assert len({len(b.forwards) for b in batches}) == 1
    assert {b.total_tokens for b in batches} == {sum(completion for _, completion in lengths.values())}
    rows = [row for b in batches for forward in b.forwards if not forward.is_idle for row in forward.row_ids]
    assert rows == batches[0].row_ids
    assert any(forward.is_idle for b in batches for forward in b.forwards)
    for b in batches:
        weights = [inputs.weights for _, inputs in b.inputs]
        assert [bool(w.any()) for w in weights] == [not forward.is_idle for forward in b.forwards]


def test_two_processes_hold_the_same_student_after_a_refresh(tmp_path: Path, forked: Forker) -> None:
    """With the ZeRO-3 teacher, dropout, and two micro-steps."""
    keys = {"teacher_ds_zero3": "true", "lora_dropout": 0.1, "grad_accum": 2, "max_steps": 4, "refresh_every": 2}
    forked.call(save_weights, tmp_path, small(tmp_path, **(TINY | keys)), processes=2).expect_success()
    assert_same_weights(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)))


def test_only_scored_positions_have_a_gradient(
    tmp_path: Path, caches: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = step_run(tmp_path, caches())
    student = student_of(run)
    states: list[torch.Tensor] = []
    hidden = Student.hidden

    def noted(self: Student, aligned: Aligned) -> torch.Tensor:
        states.append(hidden(self, aligned))
        states[-1].retain_grad()
        return states[-1]

    monkeypatch.setattr(Student, "hidden", noted)
    stir(student)
    _, snapshot = schedule.open_pool(run, Position(0, 0))
    batch = to_tensors(snapshot[:], 1.0, None, 0, run.world.device, student.vocab_size)
    loss, _ = fit.prepare(run, student).module(batch)
    loss.backward()
    assert states[0].grad is not None
    gradients = states[0].grad.flatten(0, 1)
    scored = torch.zeros(len(gradients), dtype=torch.bool)
    scored[batch.aligned.scored] = True
    assert 0 < int(scored.sum()) < len(scored)
    assert not gradients[~scored].any()
    assert gradients[scored].any(dim=1).all()


def test_compiled_layers_have_the_gradient_of_plain_ones(
    tmp_path: Path, caches: Callable[..., str], whole_gradient: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamo and autograd but no code generation: the machine may have no C++ compiler."""
    compiled: list[int] = []

    def plain_graphs(function: Any, **keywords: Any) -> Any:
        compiled.append(1)
        return torch._dynamo.optimize("aot_eager", dynamic=keywords["dynamic"])(function)

    monkeypatch.setattr(torch, "compile", plain_graphs)
    found = gradient(step_run(tmp_path, caches(), compile="true", gradient_checkpointing="true"))
    assert len(compiled) == 1, "one for all layers"
    assert relative_error(found, whole_gradient) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_really_compiled_layers_have_the_gradient_of_plain_ones(
    tmp_path: Path, caches: Callable[..., str], whole_gradient: dict[str, torch.Tensor]
) -> None:
    found = gradient(step_run(tmp_path, caches(), compile="true"))
    assert relative_error(found, whole_gradient) < 1e-5


def eager_graphs(function: Any, **keywords: Any) -> Any:
    return torch._dynamo.optimize("eager", dynamic=keywords["dynamic"])(function)


@pytest.mark.parametrize("training", [False, True])
def test_a_copy_of_compiled_layers_has_its_own_weights(
    tmp_path: Path, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", eager_graphs)
    student = student_of(make_run(tmp_path, **(TINY | {"compile": "true"})))
    student.model.train(training)
    copied = replace(student, model=copy.deepcopy(student.model))
    rows = align([np.arange(2, 7)], [np.arange(7, 12)], 0, student.device, packed=student.packs)
    expected = student.hidden(rows)
    stir(student, scale=1.0)
    assert not torch.allclose(student.hidden(rows), expected)
    torch.testing.assert_close(copied.hidden(rows), expected)


def test_without_a_compiler_compiled_layers_are_a_sentence(
    tmp_path: Path, caches: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    missing = torch._inductor.exc.InvalidCxxCompiler()

    def refusing(graph: Any, example: Any) -> Any:
        raise missing

    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic: torch._dynamo.optimize(refusing, dynamic=dynamic)(function)
    )
    with pytest.raises(UserError, match=r"could not be compiled \(.*\); install a C\+\+ compiler .*set compile: false"):
        train_from(tmp_path, caches(), compile="true")


def test_the_padding_token_does_not_matter(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches(), packing="off")
    student = student_of(run)
    stir(student)
    module = fit.prepare(run, student).module
    _, snapshot = schedule.open_pool(run, Position(0, 0))
    losses, gradients = [], []
    for pad_id in (0, 77):
        loss, _ = module(to_tensors(snapshot[:], 1.0, None, pad_id, run.world.device, student.vocab_size))
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in student.trainable.items() if p.grad is not None})
        student.model.zero_grad()
    assert torch.equal(*losses)
    assert_same_weights(*gradients)


# The loss of a step


@torch.no_grad()
def plain_logits(model: Any, record: cache.Record) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([record.prompt_ids, record.completion_ids]).astype(np.int64))[None]
    return model(input_ids=ids).logits[0, len(record.prompt_ids) - 1 : -1].float()


@pytest.mark.parametrize(
    ("signal", "keys"),
    [
        ("topk", {}), ("nucleus", {"signal_p": 0.9, "signal_floor": 2}), ("hidden", {}), ("full", {}), ("hidden", {"temperature": 2.0}),
        ("topk", {"gating": "hard"}), ("topk", {"rkl": "mc", "fkl": "argmax"}), ("hidden", {"gating": "fixed", "mix": 0.3}),
    ],
    ids=str,
)  # fmt: skip
def test_the_first_loss_is_the_loop_over_the_plain_models_logits(
    tmp_path: Path,
    caches: Callable[..., str],
    student_model: Any,
    teacher_model: Any,
    signal: str,
    keys: dict[str, Any],
) -> None:
    stored = {"signal": signal, "signal_k": 4} | {k: v for k, v in keys.items() if k.startswith("signal_")}
    run = step_run(tmp_path, caches(**stored), **(stored | keys))
    student = student_of(run)
    training = fit.prepare(run, student)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    fit.train_step(run, training, pool, batch(run, training, snapshot, pool, 0))
    step = records_of(run.folder, "step")[0]
    records = snapshot[:]
    config = fit.loss_config(run.config, V)
    student_logits = torch.cat([plain_logits(student_model, r) for r in records]).double()
    teacher_logits = torch.cat([plain_logits(teacher_model, r) for r in records]).double()
    teacher: dict[str, Any] = {"logits": teacher_logits}
    if signal in ("topk", "nucleus"):
        ids, logprobs, tails = reference.compress(
            teacher_logits, 4, keys.get("signal_p", 1.0), keys.get("signal_floor", 1)
        )
        width = max(map(len, ids))
        teacher = {
            "ids": torch.tensor([row + [-1] * (width - len(row)) for row in ids]),
            "logprobs": torch.tensor([row + [-math.inf] * (width - len(row)) for row in logprobs]),
            "log_tail_mass": torch.tensor(tails),
        }
    sampled = {
        "ids": torch.from_numpy(np.concatenate([r.completion_ids for r in records]).astype(np.int64)),
        "teacher_logprobs": torch.from_numpy(np.concatenate([r.teacher_logprobs for r in records])),
        "behaviour_logprobs": torch.from_numpy(np.concatenate([r.behaviour_logprobs for r in records])),
    }
    identity_head = {"weight": torch.eye(V, dtype=torch.float64)}
    expected = reference.dual_kl(student_logits, identity_head, teacher, config, sampled)
    assert step["tokens"] == len(student_logits)
    for name in ("loss", "rkl", "fkl", "gate"):
        value = expected[name] if name == "loss" else expected[name].mean()
        assert step[name] == pytest.approx(float(value), abs=2e-4), name
    assert step["share_forward"] == pytest.approx(float((expected["gate"] < 0.5).double().mean()), abs=0.005)


FIXED: dict[str, Any] = {
    "max_steps": 3, "refresh_every": 0, "warmup_steps": 0, "lora_dropout": 0.0, "lora_r": 32, "lora_alpha": 64, "lr": 2e-3,
    "lr_min_ratio": 0.1, "tau": 0.2, "alpha": 20.0, "signal_k": 32, "seed": 0, "max_grad_norm": 1.0, "tail_floor": 1e-8,
}  # fmt: skip
GOLDEN_LOSSES = [0.07257283, 0.11578315, 0.01581406]


def test_the_losses_of_a_fixed_run_are_those_on_record(tmp_path: Path) -> None:
    """A change that should not change results leaves them; one that should writes the new ones here."""
    run = train(tmp_path, **FIXED)
    assert [step["loss"] for step in records_of(run.folder, "step")] == pytest.approx(GOLDEN_LOSSES, abs=1e-4)


# Training


@pytest.mark.parametrize("signal", ["topk", "nucleus", "hidden", "full"])
def test_every_signal_trains(tmp_path: Path, caches: Callable[..., str], signal: str) -> None:
    keys = {"signal": signal}
    run = train_from(tmp_path, caches(**keys), batch_size=16, max_steps=8, refresh_every=0, **keys)
    losses = [step["loss"] for step in records_of(run.folder, "step")]
    assert losses[-1] < 0.8 * losses[0]


def test_full_fine_tuning_trains_all_weights(tmp_path: Path, caches: Callable[..., str], student_model: Any) -> None:
    run = train_from(tmp_path, caches(), batch_size=16, max_steps=6, refresh_every=0, use_lora="false", lr=5e-4)
    losses = [step["loss"] for step in records_of(run.folder, "step")]
    assert losses[-1] < 0.8 * losses[0]
    trained = AutoModelForCausalLM.from_pretrained(run.folder / "student", dtype=torch.float32)
    before = dict(student_model.named_parameters())
    assert all(not torch.equal(p, before[name]) for name, p in trained.named_parameters())


def test_lora_leaves_the_base_untouched(tmp_path: Path, caches: Callable[..., str], student_model: Any) -> None:
    run = make_run(tmp_path, **(TINY | {"cache_dir": caches(), "refresh_every": 0}))
    student = student_of(run)
    stage_two.train(run, student, setup.cached_vocabulary(run.config))
    before = dict(student_model.named_parameters())
    frozen = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in student.model.named_parameters()
              if not p.requires_grad}  # fmt: skip
    assert frozen.keys() == before.keys()
    assert_same_weights(frozen, before)
    assert all("lora_" in name for name in weights_in(run.folder / "student"))


def test_under_bf16_the_trained_weights_and_adamws_state_are_fp32(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = make_run(tmp_path, **(TINY | {"cache_dir": caches(), "dtype": "bf16", "batch_size": 16}))
    student = student_of(run)
    training = fit.prepare(run, student)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    for index in range(6):
        fit.train_step(run, training, pool, batch(run, training, snapshot, pool, index))
    assert {p.dtype for p in student.trainable.values()} == {torch.float32}
    assert {p.dtype for p in student.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    states = [value for state in training.optimizer.state.values() for value in state.values() if value.ndim]
    assert {value.dtype for value in states} == {torch.float32}
    losses = [step["loss"] for step in records_of(run.folder, "step")]
    assert losses[-1] < 0.9 * losses[0]


def test_adapters_that_take_bf16_as_it_is_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would turn its inputs to fp32, and autocast back to bf16."""
    random = np.random.default_rng(0)
    tokens = [random.integers(4, V, length) for length in (9, 5, 20, 30)]
    aligned = align(tokens[:2], tokens[2:], 0, torch.device("cpu"), packed=True)
    found = []
    for detour in (False, True):
        if detour:
            monkeypatch.setattr("stages.models.student._cast_once", lambda _: None)
        student = student_of(make_run(tmp_path, **(TINY | {"dtype": "bf16"})))
        stir(student)
        hidden = student.hidden(aligned)
        hidden.float().square().sum().backward()
        found.append(
            {"hidden": hidden.detach(), **{n: p.grad for n, p in student.trainable.items() if p.grad is not None}}
        )
    assert len(found[0]) > 50
    assert_same_weights(*found)


def test_the_learning_rate_of_a_record_is_the_one_of_its_step(
    tmp_path: Path, caches: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    run = train_from(tmp_path, caches(), max_steps=6, refresh_every=0, warmup_steps=2, lr=1e-3, lr_min_ratio=0.1)
    assert [record["lr"] for record in records_of(run.folder, "step")] == pytest.approx(used)


def test_warm_up_rises_to_the_peak_and_the_cosine_ends_at_its_floor(
    tmp_path: Path, caches: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    train_from(tmp_path, caches(), max_steps=8, refresh_every=0, warmup_steps=3, lr=1e-3, lr_min_ratio=0.1)
    assert used[0] > 0, "the first step moves nothing"
    assert max(used) == pytest.approx(1e-3)
    assert used.index(max(used)) in (2, 3)
    assert used[-1] < 2.5e-4


def test_a_step_is_clipped_to_the_norm(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches(), max_grad_norm=1e-4)
    training = fit.prepare(run, student_of(run))
    for parameter in training.student.trainable.values():
        parameter.grad = torch.ones_like(parameter)
    norms: list[float] = []

    def note(*_: Any) -> None:
        parameters = training.student.trainable.values()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)))

    training.optimizer.register_step_pre_hook(note)
    assert fit._update(training, 1e-4, torch.zeros(1))[1] > 1
    assert norms[0] == pytest.approx(1e-4, rel=1e-3)


def test_traces_hold_a_line_for_each_token_of_the_rows_they_show(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = train_from(tmp_path, caches(), max_steps=4, refresh_every=0, trace_every=2)
    paths = sorted((run.folder / "trace").iterdir())
    assert [path.name for path in paths] == ["step-000002.arrow", "step-000004.arrow"]
    with pa.ipc.open_file(pa.memory_map(str(paths[0]))) as reader:
        table = reader.read_all()
    snapshot = cache.open(run.config.cache_root)
    for row_id in set(table["row_id"].to_pylist()):
        part = table.filter(pa.compute.equal(table["row_id"], row_id))
        assert part["token_id"].to_pylist() == snapshot[snapshot.position(row_id)].completion_ids.tolist()
        assert part["position"].to_pylist() == list(range(part.num_rows))
    assert all(0 <= gate <= 1 for gate in table["gate"].to_pylist())
    assert all(kl >= -1e-5 for name in ("reverse_kl", "forward_kl") for kl in table[name].to_pylist())


def test_rows_of_a_refresh_replace_those_before_it(tmp_path: Path) -> None:
    run = train(tmp_path)
    index = cache.open(run.config.cache_root).index.to_pylist()
    assert {(row["refresh_index"], row["policy_step"]) for row in index} == {(0, 0), (1, 3)}
    assert len({row["policy_hash"] for row in index}) == 2
    steps, refreshes = records_of(run.folder, "step"), records_of(run.folder, "refresh")
    assert [step["refresh_index"] for step in steps] == [0, 0, 0, 1, 1, 1]
    assert [record["step"] for record in refreshes] == [3]
    assert refreshes[0]["probe_gap"] < 1e-4
    assert [step["staleness"] for step in steps] == [0, 1, 2, 0, 1, 2]


def test_rows_live_on_for_max_age_steps(tmp_path: Path) -> None:
    run = train(tmp_path, max_age=3)
    pool, _ = schedule.open_pool(run, Position(3, 1, opened_at=3))
    assert sorted(set(pool.ages.values())) == [0, 3]
    assert len(pool.row_ids) == 32


def test_training_starts_from_a_given_adapter(tmp_path: Path, caches: Callable[..., str]) -> None:
    first = train_from(tmp_path / "first", caches(), max_steps=2, refresh_every=0)
    exported = first.folder / "student"
    run = make_run(tmp_path / "second", **(TINY | {"student_adapter": exported}))
    found = {name.replace(".default", ""): p.detach() for name, p in student_of(run).trainable.items()}
    assert_same_weights(found, weights_in(exported))


# Held-out text while training


def test_held_out_divergences_are_logged_and_the_best_weights_kept(tmp_path: Path) -> None:
    run = train(tmp_path, eval_every=2, eval_prompts=4, max_steps=5, refresh_every=0, lr=5e-3, warmup_steps=1)
    evals = records_of(run.folder, "eval")
    assert [record["step"] for record in evals] == [2, 4, 5]
    assert all(record["reverse_kl"] > 0 and record["forward_kl"] > 0 for record in evals)
    lowest = min(evals, key=lambda record: record["reverse_kl"])
    assert next(record["is_best"] for record in evals if record["step"] == lowest["step"])
    kept = checkpoint.best(run.folder / "checkpoints")
    assert kept == checkpoint.Best(lowest["step"], lowest["reverse_kl"], lowest["measured_on"])


def test_held_out_divergences_do_not_change_the_training(tmp_path: Path) -> None:
    runs = [
        train(tmp_path / str(every), eval_every=every, eval_prompts=4, max_steps=3, refresh_every=0) for every in (0, 1)
    ]
    assert_same_weights(*(weights_in(run.folder / "student") for run in runs))


def test_the_best_student_is_exported_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three students that are said to have 0.3, 0.1 and 0.2 nats, the second."""
    seen: list[dict[str, torch.Tensor]] = []
    said = iter([0.3, 0.1, 0.2])

    def measured(evaluation: Any, student: Student) -> dict[str, Any]:
        seen.append({name: p.detach().clone() for name, p in student.trainable.items()})
        return {"reverse_kl": next(said), "measured_on": "a text"}

    monkeypatch.setattr(stage_two.measure, "on_teacher_text", measured)
    values = {"eval_every": 1, "eval_prompts": 4, "max_steps": 3, "refresh_every": 0, "export_checkpoint": "best"}
    run = train(tmp_path, **values)
    exported = weights_in(run.folder / "student")
    assert_same_weights({name.replace(".default", ""): tensor for name, tensor in seen[1].items()}, exported)
    newest = checkpoint.latest(run.folder / "checkpoints")
    assert newest is not None
    assert_same_weights(weights_in(newest), seen[2])
    said = iter([0.4])
    monkeypatch.setattr("sys.argv", ["evaluate", *small(tmp_path, **(TINY | {"lora_dropout": 0.1} | values))])
    monkeypatch.setattr(evaluate, "TeacherLoader", lambda *_: nullcontext())
    monkeypatch.setattr(evaluate.measure, "measure", lambda _, student, *rest: measured(None, student))
    evaluate.main()
    assert_same_weights(seen[3], seen[1])


def test_the_best_of_a_run_that_measured_nothing_is_a_sentence(tmp_path: Path, caches: Callable[..., str]) -> None:
    values: dict[str, Any] = {"max_steps": 1, "refresh_every": 0, "eval_prompts": 4}
    train_from(tmp_path, caches(), **values)
    with pytest.raises(
        UserError, match=r"reached step 1 with eval_every 0, .* raise max_steps, or set export_checkpoint"
    ):
        train_from(tmp_path, caches(), **values, eval_every=1, export_checkpoint="best")


def test_a_flipped_bit_of_the_best_weights_is_noticed(tmp_path: Path, caches: Callable[..., str]) -> None:
    student = student_of(step_run(tmp_path, caches()))
    checkpoint.save_best(tmp_path, student.trainable, checkpoint.Best(3, 0.5, "a text"))
    assert checkpoint.load_best(tmp_path, student.trainable) == checkpoint.Best(3, 0.5, "a text")
    path = tmp_path / checkpoint.BEST
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"best\.safetensors is damaged \(its tensors are not what was written"):
        checkpoint.load_best(tmp_path, student.trainable)


def test_a_run_that_begins_anew_has_no_best_yet(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches())
    student = student_of(run)
    checkpoint.save_best(run.folder / "checkpoints", student.trainable, checkpoint.Best(3, 0.0, "a text"))
    schedule.resume(run, fit.prepare(run, student))
    assert checkpoint.best(run.folder / "checkpoints") is None


def test_held_out_text_that_cannot_be_had_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_two.measure, "plain_model_fits", lambda *_: False)
    with pytest.raises(UserError, match=r"eval_every needs teacher text on held-out prompts.*give eval_teacher_text"):
        train(tmp_path, eval_every=1, eval_prompts=4)


def test_teacher_text_given_later_is_measured_whole(tmp_path: Path, caches: Callable[..., str]) -> None:
    """Not by the ids of the text that the run had written itself before."""
    values: dict[str, Any] = {"eval_every": 1, "eval_prompts": 4, "refresh_every": 0}
    train_from(tmp_path, caches(), max_steps=1, **values)
    given = caches(signal="hidden")
    run = train_from(tmp_path, caches(), max_steps=2, eval_teacher_text=given, **values)
    tokens = sum(len(record.completion_ids) for record in cache.open(given)[:])
    evals = records_of(run.folder, "eval")
    assert [record["tokens"] == tokens for record in evals] == [False, True]
    assert evals[0]["measured_on"] != evals[1]["measured_on"]


def test_teacher_text_without_rows_is_a_sentence(tmp_path: Path, caches: Callable[..., str]) -> None:
    root = tmp_path / "empty"
    hidden = cache.open(caches(signal="hidden"))
    cache.Writer(root, hidden.fingerprint, head=hidden.head()).__exit__(None, None, None)
    with pytest.raises(UserError, match=r"eval_teacher_text .*empty holds no rows; write teacher completions"):
        train_from(tmp_path, caches(), eval_every=1, eval_teacher_text=root)


# What stops a run


def test_nan_in_the_student_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    run = step_run(tmp_path, caches())
    student = student_of(run)
    training = fit.prepare(run, student)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    fit.train_step(run, training, pool, batch(run, training, snapshot, pool, 0))
    fit.save_checkpoint(run, training, Position(0, 0))
    with torch.no_grad():
        student.base.get_decoder().norm.weight[0] = math.nan
    before = {name: p.detach().clone() for name, p in student.trainable.items()}
    with pytest.raises(
        UserError, match=r"gradient of step 2 is not finite .* weights were not updated.*is kept.*Lower lr"
    ):
        fit.train_step(run, training, pool, batch(run, training, snapshot, pool, 1))
    assert_same_weights({n: p.detach() for n, p in student.trainable.items()}, before)
    newest = checkpoint.latest(run.folder / "checkpoints")
    assert newest is not None
    assert checkpoint.read_position(newest).step == 1


def test_a_cache_without_live_rows_is_a_sentence(tmp_path: Path, caches: Callable[..., str]) -> None:
    root = tmp_path / "empty"
    snapshot = cache.open(caches())
    cache.Writer(root, snapshot.fingerprint).__exit__(None, None, None)
    with pytest.raises(UserError, match=r"holds no rollouts to train on \(0 rows.*stages\.rollout"):
        train_from(tmp_path, str(root))


def test_a_cached_head_is_read_once(tmp_path: Path, caches: Callable[..., str]) -> None:
    root = caches(signal="hidden")
    snapshot = cache.open(root)
    head = feed.teacher_head_of(snapshot, torch.device("cpu"))
    assert isinstance(head, Head)
    assert feed.teacher_head_of(cache.open(root), torch.device("cpu")) is head
