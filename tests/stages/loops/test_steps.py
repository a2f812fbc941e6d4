"""Stage two: the gradient and the loss of a step, however it is cut."""

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import is_frozen_dataclass

import cache
from stages.data.alignment import Aligned, align
from stages.data.batches import to_tensors
from stages.loops import feed, refresh, schedule, steps
from stages.loops.budgets import Caps
from stages.models.student import Student
from stages.runtime.checkpoint import Position
from stages.runtime.errors import UserError
from stages.runtime.run import Run, open_run
from tests.support import reference
from tests.support.helpers import Forker, assert_same_weights, make_run, records_of, small
from tests.support.thinning import leading, thinned
from tests.support.tiny_runs import TINY, batch, save_weights, step_run, stir, student_of, train, train_from

V = 230


# The gradient of a step


def gradient(run: Run) -> dict[str, torch.Tensor]:
    """The gradient that `train_step` hands to the optimizer for the first batch."""
    student = student_of(run)
    stir(student)
    training = steps.prepare(run, student)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    found: dict[str, torch.Tensor] = {}

    def keep(training: steps.Training, max_grad_norm: float, sums: torch.Tensor) -> tuple[list[float], float]:
        found.update(
            {name: p.grad.clone() for name, p in training.student.trainable.items() if p.grad is not None}
        )
        training.step += 1
        return sums.tolist(), 1.0

    original, steps._update = steps._update, keep
    try:
        steps.train_step(run, training, pool, batch(run, training, snapshot, pool, 0))
    finally:
        steps._update = original
    return found


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|found - expected| / |expected| over all parameters together."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    return math.sqrt(difference / sum(float(tensor.double().square().sum()) for tensor in expected.values()))


@pytest.fixture(scope="module")
def whole_gradient(
    caches: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Of a step of 16 rows in one padded forward."""
    return gradient(step_run(tmp_path_factory.mktemp("whole"), caches(), packing="off"))


SPLITS: list[dict[str, Any]] = [
    {"grad_accum": 4},
    {"grad_accum": 16},
    {"lp_micro_batch": 3},
    {"micro_batch_tokens": 130},
    {"micro_batch_tokens": 1},
    {"grad_accum": 2, "lp_micro_batch": 5, "micro_batch_tokens": 200},
    {"gradient_checkpointing": "true"},
]


@pytest.mark.parametrize(("split", "packing"), thinned(3, [{}, *SPLITS], ["on", "off"]), ids=str)
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(
    tmp_path: Path,
    caches: Callable[..., str],
    whole_gradient: dict[str, torch.Tensor],
    split: dict[str, Any],
    packing: str,
) -> None:
    found = gradient(step_run(tmp_path, caches(), packing=packing, **split))
    assert len(found) > 50
    assert relative_error(found, whole_gradient) < 1e-5


@pytest.fixture(scope="module")
def gradient_in_groups(
    caches: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, torch.Tensor]]:
    """Of a step of four groups of four rows in one padded forward; with LoRA or without."""

    def of(use_lora: str) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("groups")
        return gradient(
            step_run(folder, caches(group_size=4), packing="off", use_lora=use_lora, group_size=4)
        )

    return of


@pytest.mark.parametrize("use_lora", ["true", "false"])
@pytest.mark.parametrize(
    "split", leading(2, [{}, {"micro_batch_tokens": 130}, {"lp_micro_batch": 3}, {"grad_accum": 4}]), ids=str
)
def test_rows_that_share_prompts_have_the_gradient_of_padded_ones(
    tmp_path: Path,
    caches: Callable[..., str],
    gradient_in_groups: Callable[[str], dict[str, torch.Tensor]],
    use_lora: str,
    split: dict[str, Any],
) -> None:
    run = step_run(tmp_path, caches(group_size=4), use_lora=use_lora, group_size=4, **split)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    student = student_of(run)
    inputs = batch(run, steps.prepare(run, student), snapshot, pool, 0).inputs
    assert next(inputs)[1].aligned.packing.shared is not None
    assert relative_error(gradient(run), gradient_in_groups(use_lora)) < 1e-5


def test_two_processes_with_shared_prompts_have_the_gradient_of_one(
    tmp_path: Path,
    forked: Forker,
    caches: Callable[..., str],
    gradient_in_groups: Callable[[str], dict[str, torch.Tensor]],
) -> None:
    values = {"cache_dir": caches(group_size=4), "batch_size": 16, "group_size": 4, "micro_batch_tokens": 100}
    forked.call(save_gradient, tmp_path, small(tmp_path, **(TINY | values)), processes=2).expect_success()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_same_weights(*ranks)
    assert relative_error(ranks[0], gradient_in_groups("true")) < 1e-5


def test_the_record_of_packing_says_whether_prompts_are_shared(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    values = {"max_steps": 1, "refresh_mode": "off"}
    for group_size, packing, reason in (
        (4, "on", ""),
        (1, "on", "group_size is 1"),
        (4, "off", "rows are pad"),
    ):
        folder = tmp_path / f"{group_size}-{packing}"
        run = train_from(folder, caches(group_size=4), group_size=group_size, packing=packing, **values)
        record = records_of(run.folder, "packing")[0]
        assert record["shared"] is not bool(reason)
        assert record["unshared_reason"].startswith(reason)


def save_gradient(folder: Path, flags: list[str]) -> None:
    """In a process of its own: this rank's gradient, to folder/RANK.pt."""
    run = open_run("", flags)
    torch.save(gradient(run), folder / f"{run.world.rank}.pt")


RANKS: list[tuple[int, dict[str, Any]]] = [
    (2, {"grad_accum": 4}),
    (2, {"micro_batch_tokens": 100}),
    (2, {}),
    (2, {"packing": "off", "micro_batch_tokens": 200}),
    (4, {"micro_batch_tokens": 100}),
]


@pytest.mark.parametrize(("processes", "split"), leading(2, RANKS), ids=str)
def test_several_processes_have_the_gradient_of_one(
    tmp_path: Path,
    forked: Forker,
    caches: Callable[..., str],
    whole_gradient: dict[str, torch.Tensor],
    processes: int,
    split: dict[str, Any],
) -> None:
    """Under micro_batch_tokens the ranks need different numbers of forwards; the one short of work runs idle
    ones.
    """
    arguments = small(tmp_path, **(TINY | {"cache_dir": caches(), "batch_size": 16} | split))
    forked.call(save_gradient, tmp_path, arguments, processes=processes).expect_success()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    for other in ranks[1:]:
        assert_same_weights(other, ranks[0])
    assert relative_error(ranks[0], whole_gradient) < 1e-5


@pytest.mark.thorough
def test_full_fine_tuning_on_two_processes_has_the_gradient_of_one(
    tmp_path: Path, forked: Forker, caches: Callable[..., str]
) -> None:
    arguments = small(tmp_path, **(TINY | {"cache_dir": caches(), "batch_size": 16, "use_lora": "false"}))
    forked.call(save_gradient, tmp_path, arguments, processes=2).expect_success()
    expected = gradient(open_run("", arguments))
    assert "model.embed_tokens.weight" in expected
    assert relative_error(torch.load(tmp_path / "1.pt"), expected) < 1e-5


def test_two_processes_train_the_student_of_one(tmp_path: Path, forked: Forker) -> None:
    """Up to a refresh: after it the last bits of the weights, in the policy's hash, seed other rollouts.

    Gradients agree to 1e-5 (above); AdamW's first steps divide by them, which magnifies the rounding of small
    ones.
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


def test_every_rank_knows_how_many_forwards_the_longest_has(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    """And all tokens of the step, without messages from other ranks; ranks short of work run idle ones."""
    run = step_run(tmp_path, caches())
    student = student_of(run)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    lengths = {row_id: (10, 80 if i % 5 == 0 else 10) for i, row_id in enumerate(pool.row_ids)}
    pool = replace(pool, lengths=lengths)
    batches = []
    for rank in range(4):
        here = replace(run, world=replace(run.world, rank=rank, size=4))
        batches.append(next(feed.global_batches(here, student, snapshot, pool, [0], Caps(64, 100))))
    assert len({len(b.forwards) for b in batches}) == 1
    assert {b.total_tokens for b in batches} == {sum(completion for _, completion in lengths.values())}
    rows = [row for b in batches for forward in b.forwards if not forward.is_idle for row in forward.row_ids]
    assert rows == batches[0].row_ids
    assert any(forward.is_idle for b in batches for forward in b.forwards)
    for b in batches:
        weights = [inputs.weights for _, inputs in b.inputs]
        assert [bool(w.any()) for w in weights] == [not forward.is_idle for forward in b.forwards]


@pytest.mark.thorough
def test_two_processes_hold_the_same_student_after_a_refresh(tmp_path: Path, forked: Forker) -> None:
    """With the ZeRO-3 teacher, dropout, and two micro-steps."""
    keys = {
        "teacher_ds_zero3": "true",
        "lora_dropout": 0.1,
        "grad_accum": 2,
        "max_steps": 4,
        "refresh_every": 2,
    }
    forked.call(save_weights, tmp_path, small(tmp_path, **(TINY | keys)), processes=2).expect_success()
    assert_same_weights(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)))


def save_weights_after_moves(folder: Path, arguments: list[str]) -> None:
    """In a separate process: `save_weights`, with weights that change their memory at every refresh.

    So do those of a student that makes room for the teacher on a GPU.
    """
    own = refresh.refresh

    def moving(run: Run, student: Student, *rest: Any) -> None:
        own(run, student, *rest)
        student.model.double()
        student.model.float()

    refresh.refresh = moving  # type: ignore[assignment]
    save_weights(folder, arguments)


@pytest.mark.thorough
def test_gradients_are_summed_over_processes_after_the_student_has_moved(
    tmp_path: Path, forked: Forker
) -> None:
    arguments = small(tmp_path, **(TINY | {"max_steps": 4, "refresh_every": 2}))
    forked.call(save_weights_after_moves, tmp_path, arguments, processes=2).expect_success()
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
    loss, _ = steps.prepare(run, student).module(batch)
    loss.backward()
    assert states[0].grad is not None
    gradients = states[0].grad.flatten(0, 1)
    scored = torch.zeros(len(gradients), dtype=torch.bool)
    scored[batch.aligned.scored] = True
    assert 0 < int(scored.sum()) < len(scored)
    assert not gradients[~scored].any()
    assert gradients[scored].any(dim=1).all()


def test_compiled_layers_have_the_gradient_of_plain_ones(
    tmp_path: Path,
    caches: Callable[..., str],
    whole_gradient: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
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


@pytest.mark.parametrize("shared", [False, True])
def test_batches_of_other_lengths_do_not_compile_the_layers_again(
    tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", eager_graphs)
    student = student_of(make_run(tmp_path, **(TINY | {"compile": "true"})))
    student.model.train()

    def forward(lengths: list[int]) -> None:
        prompts = [np.arange(2, 5 + i // 2) for i, _ in enumerate(lengths)]
        rows = align(
            prompts,
            [np.arange(7, 7 + length) for length in lengths],
            0,
            student.device,
            packed=True,
            shared=shared,
        )
        # torch 2.11 compiles again for every value in a frozen dataclass; later versions do not.
        assert not any(is_frozen_dataclass(each) for each in (rows.packing, rows.packing.shared))
        student.hidden(rows).sum().backward()

    forward([5, 3, 4, 7])
    forward([6, 4, 4, 2, 9, 3])
    with torch._dynamo.config.patch(error_on_recompile=True):
        forward([3, 7, 5, 6, 2, 2, 8, 4])
        forward([8, 2])


@pytest.mark.thorough
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
        torch,
        "compile",
        lambda function, dynamic: torch._dynamo.optimize(refusing, dynamic=dynamic)(function),
    )
    with pytest.raises(
        UserError, match=r"could not be compiled \(.*\); install a C\+\+ compiler .*set compile: false"
    ):
        train_from(tmp_path, caches(), compile="true")


def test_the_padding_token_does_not_matter(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches(), packing="off")
    student = student_of(run)
    stir(student)
    module = steps.prepare(run, student).module
    _, snapshot = schedule.open_pool(run, Position(0, 0))
    losses, gradients = [], []
    for pad_id in (0, 77):
        loss, _ = module(to_tensors(snapshot[:], 1.0, None, pad_id, run.world.device, student.vocab_size))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(
            {name: p.grad.clone() for name, p in student.trainable.items() if p.grad is not None}
        )
        student.model.zero_grad()
    assert torch.equal(*losses)
    assert_same_weights(*gradients)


# The loss of a step


@torch.no_grad()
def plain_logits(model: Any, record: cache.Record) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([record.prompt_ids, record.completion_ids]).astype(np.int64))[None]
    return model(input_ids=ids).logits[0, len(record.prompt_ids) - 1 : -1].float()


def reference_teacher(logits: torch.Tensor, signal: str, p: float) -> dict[str, Any]:
    """What `reference.dual_kl` takes as teacher: 8 kept ids of top-k and nucleus rows, else all logits."""
    if signal not in ("topk", "nucleus"):
        return {"logits": logits}
    ids, logprobs, tails = reference.compress(logits, 8, p, 4 if signal == "nucleus" else 1)
    width = max(map(len, ids))
    return {
        "ids": torch.tensor([row + [-1] * (width - len(row)) for row in ids]),
        "logprobs": torch.tensor([row + [-math.inf] * (width - len(row)) for row in logprobs]),
        "log_tail_mass": torch.tensor(tails),
    }


@pytest.mark.parametrize(
    ("signal", "keys"),
    leading(
        3,
        [
            ("topk", {"rkl": "mc", "fkl": "argmax"}),
            ("nucleus", {"signal_p": 0.9}),
            ("hidden", {"temperature": 2.0}),
            ("full", {}),
            ("topk", {}),
            ("hidden", {}),
            ("topk", {"gating": "hard"}),
            ("hidden", {"gating": 0.3}),
        ],
    ),
    ids=str,
)
def test_the_first_loss_is_the_loop_over_the_plain_models_logits(
    tmp_path: Path,
    caches: Callable[..., str],
    student_model: Any,
    teacher_model: Any,
    signal: str,
    keys: dict[str, Any],
) -> None:
    stored = {"signal": signal, "signal_k": 8} | {k: v for k, v in keys.items() if k.startswith("signal_")}
    run = step_run(tmp_path, caches(**stored), **(stored | keys))
    student = student_of(run)
    training = steps.prepare(run, student)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    steps.train_step(run, training, pool, batch(run, training, snapshot, pool, 0))
    step = records_of(run.folder, "step")[0]
    records = snapshot[:]
    config = run.config.loss.settings(V)
    student_logits = torch.cat([plain_logits(student_model, r) for r in records]).double()
    teacher_logits = torch.cat([plain_logits(teacher_model, r) for r in records]).double()
    teacher = reference_teacher(teacher_logits, signal, keys.get("signal_p", 1.0))
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
    stored_entropy = np.concatenate([r.teacher_entropy for r in records])
    assert step["teacher_entropy"] == pytest.approx(float(stored_entropy.mean()), rel=1e-5)
    logprobs = torch.log_softmax(student_logits / run.config.loss.temperature, -1)
    taken = logprobs.gather(1, sampled["ids"][:, None])
    assert step["student_logprob"] == pytest.approx(float(taken.mean()), abs=2e-4)


FIXED: dict[str, Any] = {
    "max_steps": 3,
    "refresh_every": 0,
    "warmup_steps": 0,
    "lora_dropout": 0.0,
    "lora_r": 32,
    "lora_alpha": 64,
    "lr": 2e-3,
    "tau": 0.2,
    "alpha": 20.0,
    "signal_k": 32,
    "seed": 0,
}
GOLDEN_LOSSES = [0.07257283, 0.11578315, 0.01581406]


def test_the_losses_of_a_fixed_run_are_those_on_record(tmp_path: Path) -> None:
    """A change that should not change results leaves them; one that should writes the new ones here."""
    run = train(tmp_path, **FIXED)
    assert [step["loss"] for step in records_of(run.folder, "step")] == pytest.approx(GOLDEN_LOSSES, abs=1e-4)
