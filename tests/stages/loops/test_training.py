"""Stage two: what a run of steps trains and records, held-out text on its way, and what stops it."""

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import cache
from dualkl import HiddenTeacher
from stages import evaluate
from stages import train as stage_two
from stages.data.alignment import align, at_scored
from stages.loops import feed, schedule, setup, steps, tracing
from stages.loops.caches import check_teacher_text
from stages.models.dropout import evaluating
from stages.models.student import Student
from stages.runtime import checkpoint, traces
from stages.runtime.checkpoint import Position
from stages.runtime.errors import UserError
from tests.support.helpers import assert_same_weights, make_run, records_of, small, weights_in
from tests.support.thinning import leading
from tests.support.tiny_runs import TINY, batch, step_run, stir, student_of, train, train_from

V = 230


# Training


@pytest.mark.parametrize("signal", leading(1, ["hidden", "topk", "nucleus", "full"]))
def test_every_signal_trains(tmp_path: Path, caches: Callable[..., str], signal: str) -> None:
    keys = {"signal": signal}
    run = train_from(tmp_path, caches(**keys), batch_size=16, max_steps=8, refresh_every=0, **keys)
    losses = [step["loss"] for step in records_of(run.folder, "step")]
    assert losses[-1] < 0.8 * losses[0]


def test_full_fine_tuning_trains_all_weights(
    tmp_path: Path, caches: Callable[..., str], student_model: Any
) -> None:
    run = train_from(
        tmp_path, caches(), batch_size=16, max_steps=6, refresh_every=0, use_lora="false", lr=5e-4
    )
    losses = [step["loss"] for step in records_of(run.folder, "step")]
    assert losses[-1] < 0.8 * losses[0]
    trained = AutoModelForCausalLM.from_pretrained(run.folder / "student", dtype=torch.float32)
    before = dict(student_model.named_parameters())
    assert all(not torch.equal(p, before[name]) for name, p in trained.named_parameters())


def test_lora_leaves_the_base_untouched(
    tmp_path: Path, caches: Callable[..., str], student_model: Any
) -> None:
    run = make_run(tmp_path, **(TINY | {"cache_dir": caches(), "refresh_every": 0}))
    student = student_of(run)
    stage_two.train(run, student, setup.cached_vocabulary(run.config))
    before = dict(student_model.named_parameters())
    frozen = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p
        for n, p in student.model.named_parameters()
        if not p.requires_grad
    }
    assert frozen.keys() == before.keys()
    assert_same_weights(frozen, before)
    assert all("lora_" in name for name in weights_in(run.folder / "student"))


def test_under_bf16_the_trained_weights_and_adamws_state_are_fp32(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    run = make_run(tmp_path, **(TINY | {"cache_dir": caches(), "dtype": "bf16", "batch_size": 16}))
    student = student_of(run)
    training = steps.prepare(run, student)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    for index in range(6):
        steps.train_step(run, training, pool, batch(run, training, snapshot, pool, index))
    assert {p.dtype for p in student.trainable.values()} == {torch.float32}
    assert {p.dtype for p in student.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    states = [value for state in training.optimizer.state.values() for value in state.values() if value.ndim]
    assert {value.dtype for value in states} == {torch.float32}
    losses = [step["loss"] for step in records_of(run.folder, "step")]
    assert losses[-1] < 0.9 * losses[0]


def test_adapters_that_take_bf16_as_it_is_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            {
                "hidden": hidden.detach(),
                **{n: p.grad for n, p in student.trainable.items() if p.grad is not None},
            }
        )
    assert len(found[0]) > 50
    assert_same_weights(*found)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of each step that AdamW takes."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return rates


def test_the_learning_rate_of_a_record_is_the_one_of_its_step(
    tmp_path: Path, caches: Callable[..., str], used: list[float]
) -> None:
    run = train_from(tmp_path, caches(), max_steps=6, refresh_every=0, warmup_steps=2, lr=1e-3)
    assert [record["lr"] for record in records_of(run.folder, "step")] == pytest.approx(used)


def test_warm_up_rises_to_the_peak_and_the_cosine_ends_at_its_floor(
    tmp_path: Path, caches: Callable[..., str], used: list[float]
) -> None:
    train_from(tmp_path, caches(), max_steps=8, refresh_every=0, warmup_steps=3, lr=1e-3)
    assert used[0] > 0, "the first step moves nothing"
    assert max(used) == pytest.approx(1e-3)
    assert used.index(max(used)) in (2, 3)
    assert used[-1] < 2.5e-4


def test_a_step_is_clipped_to_the_norm(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches())
    training = steps.prepare(run, student_of(run))
    for parameter in training.student.trainable.values():
        parameter.grad = torch.ones_like(parameter)
    norms: list[float] = []

    def note(*_: Any) -> None:
        parameters = training.student.trainable.values()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)))

    training.optimizer.register_step_pre_hook(note)
    assert steps._update(training, 1e-4, torch.zeros(1))[1] > 1
    assert norms[0] == pytest.approx(1e-4, rel=1e-3)


def test_traces_hold_what_the_step_computed_for_the_tokens_of_a_few_rows(
    tmp_path: Path, caches: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "NUM_ROWS", 3)
    run = train_from(tmp_path, caches(), max_steps=4, refresh_every=0, trace_every=2, checkpoint_every=1)
    paths = traces.paths(run.folder)
    assert [path.name for path in paths] == [f"step-00000{step}.arrow" for step in (1, 2, 4)]
    snapshot = cache.open(run.config.cache_root)
    for trace in traces.read(paths[2]):
        record = snapshot[snapshot.position(trace.row_id)]
        assert trace.step == 4
        assert trace.token_ids.tolist() == record.completion_ids.tolist()
        student = student_of(run)  # with the weights of step 4: of its end, not of its start
        checkpoint.load_weights(checkpoint.of_step(run.folder / "checkpoints", 3), student.trainable)
        logp_TV = _logprobs(student, record)
        top = logp_TV.topk(traces.NUM_TOP)
        np.testing.assert_array_equal(trace.top_ids, top.indices)
        np.testing.assert_allclose(trace.top_logprobs, top.values, atol=1e-4)
        own = logp_TV.gather(1, torch.tensor(trace.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(trace.scalars["student_logprob"], own, atol=1e-4)
        entropy = -(logp_TV.exp() * logp_TV).sum(1)
        np.testing.assert_allclose(trace.scalars["student_entropy"], entropy, atol=1e-4)
        tail = np.exp(trace.scalars["student_log_tail_mass"])
        outside = 1 - logp_TV.exp().gather(1, torch.tensor(record.signal.ids).long()).sum(1)
        np.testing.assert_allclose(tail, outside, atol=1e-4)
        gate = 1 / (1 + np.exp(-run.config.loss.alpha * (run.config.loss.tau - trace.scalars["reverse_kl"])))
        np.testing.assert_allclose(trace.scalars["gate"], gate, atol=1e-4)
    assert len(traces.read(paths[2])) == 3


def _logprobs(student: Student, record: cache.Record) -> torch.Tensor:
    """[T, V] of the student at the scored positions of one row."""
    aligned = align([record.prompt_ids], [record.completion_ids], 0, student.device)
    with torch.no_grad(), evaluating(student.model):
        logits_TV = at_scored(student.hidden(aligned), aligned) @ student.head.weight.T
    return logits_TV[:, : student.vocab_size].float().log_softmax(1)


def test_rows_of_a_refresh_replace_those_before_it(tmp_path: Path) -> None:
    run = train(tmp_path)
    index = cache.open(run.config.cache_root).index.to_pylist()
    assert {(row["refresh_index"], row["policy_step"]) for row in index} == {(0, 0), (1, 3)}
    assert len({row["policy_hash"] for row in index}) == 2
    records, refreshes = records_of(run.folder, "step"), records_of(run.folder, "refresh")
    assert [step["refresh_index"] for step in records] == [0, 0, 0, 1, 1, 1]
    assert [record["step"] for record in refreshes] == [3]
    assert refreshes[0]["probe_gap"] < 1e-4
    assert [step["staleness"] for step in records] == [0, 1, 2, 0, 1, 2]


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


@pytest.mark.thorough
def test_held_out_divergences_do_not_change_the_training(tmp_path: Path) -> None:
    runs = [
        train(tmp_path / str(every), eval_every=every, eval_prompts=4, max_steps=3, refresh_every=0)
        for every in (0, 1)
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
    values = {
        "eval_every": 1,
        "eval_prompts": 4,
        "max_steps": 3,
        "refresh_every": 0,
        "export_checkpoint": "best",
    }
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


def test_the_best_of_a_run_that_measured_nothing_is_a_sentence(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
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
    with pytest.raises(
        UserError, match=r"best\.safetensors is damaged \(its tensors are not what was written"
    ):
        checkpoint.load_best(tmp_path, student.trainable)


def test_a_run_that_begins_anew_has_no_best_yet(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = step_run(tmp_path, caches())
    student = student_of(run)
    checkpoint.save_best(run.folder / "checkpoints", student.trainable, checkpoint.Best(3, 0.0, "a text"))
    schedule.resume(run, steps.prepare(run, student))
    assert checkpoint.best(run.folder / "checkpoints") is None


def test_held_out_text_that_cannot_be_had_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_two.measure, "plain_model_fits", lambda *_: False)
    with pytest.raises(
        UserError, match=r"eval_every needs teacher text on held-out prompts.*give eval_teacher_text"
    ):
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
    config = step_run(tmp_path, caches(), eval_every=1, eval_teacher_text=root).config
    with pytest.raises(
        UserError, match=r"eval_teacher_text .*empty holds no rows; write teacher completions"
    ):
        check_teacher_text(config, str(root), setup.cached_vocabulary(config))


# What stops a run


def test_nan_in_the_student_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    run = step_run(tmp_path, caches())
    student = student_of(run)
    training = steps.prepare(run, student)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    steps.train_step(run, training, pool, batch(run, training, snapshot, pool, 0))
    steps.save_checkpoint(run, training, Position(0, 0))
    with torch.no_grad():
        student.base.get_decoder().norm.weight[0] = math.nan
    before = {name: p.detach().clone() for name, p in student.trainable.items()}
    with pytest.raises(
        UserError, match=r"gradient of step 2 is not finite .* weights were not updated.*are kept.*Lower lr"
    ):
        steps.train_step(run, training, pool, batch(run, training, snapshot, pool, 1))
    assert_same_weights({n: p.detach() for n, p in student.trainable.items()}, before)
    newest = checkpoint.latest(run.folder / "checkpoints")
    assert newest is not None
    assert checkpoint.read_position(newest).step == 1


def test_a_cache_without_live_rows_is_a_sentence(tmp_path: Path, caches: Callable[..., str]) -> None:
    root = tmp_path / "empty"
    snapshot = cache.open(caches())
    cache.Writer(root, snapshot.fingerprint).__exit__(None, None, None)
    with pytest.raises(UserError, match=r"holds no rollouts to train on \(0 rows.*`dualkl rollout`"):
        train_from(tmp_path, str(root))


def test_a_cached_head_is_freed_with_the_batches_that_use_it(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    run = step_run(tmp_path, caches(signal="hidden"), signal="hidden")
    training = steps.prepare(run, student_of(run))
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    batches = feed.global_batches(run, training.student, snapshot, pool, [0], training.caps)
    head = None
    for _, micro in next(batches).inputs:
        assert isinstance(micro.teacher, HiddenTeacher)
        head = weakref.ref(micro.teacher.lm_head.weight)
    assert head is not None
    assert head() is not None
    del micro
    batches.close()
    assert head() is None
