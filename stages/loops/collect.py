"""Generate, score, commit: one planned unit of rollouts at a time, the missing ones only."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

import cache
from dualkl import Head
from dualkl.heads import prepare_head
from dualkl.targets import compress
from stages.data.alignment import align, at_scored
from stages.data.prompts import Prompt
from stages.models.generation import Completion, Sampling, generate
from stages.models.teacher import Teacher
from stages.runtime.config import Config, SignalSection
from stages.runtime.errors import UserError
from stages.runtime.run import Run

AUTO_GEN_ROWS = 128
AUTO_SCORE_ROWS = 64
AUTO_SCORE_TOKENS = 16_384


@dataclass(frozen=True)
class PlannedRow:
    row_id: str
    prompt: Prompt
    occurrence: int  # how often the same prompt came before in this plan
    sample_index: int
    refresh_index: int


@dataclass(frozen=True)
class Unit:
    """Rows that are generated, scored and committed together; its content depends on the plan alone."""

    name: str
    rows: tuple[PlannedRow, ...]


@dataclass(frozen=True)
class Author:
    """A model that writes completions, and what the cache must know of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    run_id: str
    policy_hash: str
    policy_step: int
    sampling: Sampling
    vocab_size: int
    eos_ids: tuple[int, ...]
    autocast: Callable[[], AbstractContextManager]


def plan(
    prompts: Sequence[Prompt], *, seed: int, run_id: str, policy_hash: str, refresh_index: int,
    num_rollouts: int, group_size: int, rollouts_per_unit: int, first_rollout: int = 0,
) -> list[Unit]:  # fmt: skip
    """The units of a refresh: the next `num_rollouts / group_size` prompts in turn, `group_size` completions each.

    `first_rollout`: how many rollouts the refreshes before it plan.
    """
    occurrences: Counter[str] = Counter()
    rows = []
    for index in range(first_rollout // group_size, (first_rollout + num_rollouts) // group_size):
        prompt = prompts[index % len(prompts)]
        for sample in range(group_size):
            row_id = _row_id(seed, policy_hash, prompt.prompt_id, occurrences[prompt.prompt_id], sample, refresh_index)
            rows.append(PlannedRow(row_id, prompt, occurrences[prompt.prompt_id], sample, refresh_index))
        occurrences[prompt.prompt_id] += 1
    starts = range(0, len(rows), rollouts_per_unit)
    prefix = f"{run_id}-g{refresh_index:04d}-{policy_hash[:8]}"
    return [Unit(f"{prefix}-{i:05d}", tuple(rows[s : s + rollouts_per_unit])) for i, s in enumerate(starts)]


def missing_units(units: Sequence[Unit], committed_ids: set[str]) -> list[Unit]:
    return [unit for unit in units if not all(row.row_id in committed_ids for row in unit.rows)]


def collect(run: Run, units: Sequence[Unit], author: Author, get_teacher: Callable[[], Teacher], writer: cache.Writer,
            signal: SignalSection) -> int:  # fmt: skip
    """Writes the units that `writer`'s cache lacks, spread over the ranks; returns how many there were (collective).

    Each rank scores one unit a round, ranks without a unit join its ZeRO-3 forwards with dummies.
    """
    todo = missing_units(units, run.world.gather(writer.committed_ids)[0])
    mine = todo[run.world.rank :: run.world.size]
    num_rounds = -(-len(todo) // run.world.size)
    bar = tqdm(total=sum(len(u.rows) for u in todo), unit="rollout", desc="rollouts", leave=False,
               disable=not run.world.is_main)  # fmt: skip
    with bar:
        for turn in range(num_rounds):
            unit = mine[turn] if turn < len(mine) else None
            bar.update(sum(run.world.gather(_collect_unit(run, unit, author, get_teacher(), writer, signal))))
    run.world.barrier()
    return len(todo)


def _collect_unit(
    run: Run, unit: Unit | None, author: Author, teacher: Teacher, writer: cache.Writer, signal: SignalSection
) -> int:
    """Generates, scores and commits this rank's unit of a round; returns its rows."""
    with run.clock.phase("rollout"):
        completions = _write(run.config, unit, author) if unit else []
    with run.clock.phase("score"):
        for record in _score(run, unit, completions, author, teacher, signal):
            writer.append(record)
        if unit:
            writer.commit(unit.name)
    return len(completions)


def _row_id(*parts: object) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:32]


def _write(config: Config, unit: Unit, author: Author) -> list[Completion]:
    size = config.rollout.gen_micro_batch
    with author.autocast():
        completions = generate(
            author.model, [row.prompt.ids for row in unit.rows], [int(row.row_id, 16) for row in unit.rows], author.sampling,
            vocab_size=author.vocab_size, eos_ids=author.eos_ids, pad_id=author.tokenizer.pad_token_id,
            micro_batch=AUTO_GEN_ROWS if size == "auto" else size,
        )  # fmt: skip
    for row, completion in zip(unit.rows, completions, strict=True):
        if not np.isfinite(completion.logprobs).all():
            raise UserError(
                f"the generating model gave NaN or infinite logits on prompt {row.prompt.prompt_id} (policy step"
                f" {author.policy_step}); nothing of unit {unit.name} was kept. Check the weights, or lower lr."
            )
    return completions


def _score(
    run: Run,
    unit: Unit | None,
    completions: list[Completion],
    author: Author,
    teacher: Teacher,
    signal: SignalSection,
) -> Iterator[cache.Record]:
    batches = list(scoring_batches(run.config, unit, completions)) if unit else []
    num_forwards = int(run.world.max([len(batches)])[0]) if teacher.is_collective else len(batches)
    for index in range(num_forwards):
        if index >= len(batches):
            teacher.dummy()
            continue
        assert unit is not None
        yield from _score_batch(unit, completions, batches[index], author, teacher, signal)


def scoring_batches(config: Config, unit: Unit, completions: list[Completion]) -> Iterator[list[int]]:
    """Row indices of each scoring forward: like lengths together, at most lp_micro_batch rows and score_tokens tokens."""
    rows, tokens = config.rollout.lp_micro_batch, config.rollout.score_tokens
    max_rows = AUTO_SCORE_ROWS if rows == "auto" else rows
    max_tokens = AUTO_SCORE_TOKENS if tokens == "auto" else tokens
    lengths = [len(row.prompt.ids) + len(c.ids) for row, c in zip(unit.rows, completions, strict=True)]
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == max_rows or (len(batch) + 1) * lengths[batch[0]] > max_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _score_batch(
    unit: Unit,
    completions: list[Completion],
    batch: list[int],
    author: Author,
    teacher: Teacher,
    signal: SignalSection,
) -> Iterator[cache.Record]:
    prompts = [unit.rows[i].prompt.ids for i in batch]
    written = [completions[i] for i in batch]
    aligned = align(prompts, [c.ids for c in written], author.tokenizer.pad_token_id, teacher.device)
    hidden_ND = at_scored(teacher.hidden(aligned.input_ids, aligned.attention_mask), aligned)
    columns = teacher_columns(hidden_ND, teacher.head, aligned.targets, signal, author.vocab_size)
    for name in ("teacher_logprobs", "teacher_entropy"):
        if not np.isfinite(columns[name]).all():
            raise UserError(
                f"the teacher gave NaN or infinite values ({name}) in unit {unit.name}; nothing of it was kept."
                " Check its weights and teacher_dtype."
            )
    start = 0
    for i, completion in zip(batch, written, strict=True):
        end = start + len(completion.ids)
        own = {name: array[start:end] for name, array in columns.items() if not name.startswith("signal_")}
        kept = _signal_rows(columns, signal, slice(start, end), teacher, author.vocab_size)
        yield _record(unit.rows[i], completion, author, own, kept)
        start = end


def teacher_columns(
    hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, signal: SignalSection, vocab_size: int
) -> dict[str, np.ndarray]:
    """Per scored token what every row stores, and under `signal_*` what only its signal needs."""
    kind = signal.signal
    k = min(signal.signal_k, vocab_size) if kind in ("topk", "nucleus") else 1
    kept = compress(
        hidden_ND,
        head,
        targets_N,
        k=k,
        p=signal.signal_p if kind == "nucleus" else 1.0,
        floor=min(signal.signal_floor, k) if kind == "nucleus" else 1,
        vocab_size=vocab_size,
    )
    columns = {
        "teacher_logprobs": kept.sampled_logprobs,
        "teacher_entropy": kept.entropy,
        "log_tail_mass": kept.log_tail_mass
        if kind in ("topk", "nucleus")
        else torch.full_like(kept.entropy, -torch.inf),
        "top1_id": kept.ids[:, 0],
        "top1_logprob": kept.logprobs[:, 0],
    }
    if kind in ("topk", "nucleus"):
        columns |= {"signal_ids": kept.ids, "signal_logprobs": kept.logprobs}
    else:
        columns["signal_hidden"] = hidden_ND
    return {name: to_numpy(tensor) for name, tensor in columns.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A CPU copy; bfloat16, which numpy lacks, as uint16 bit patterns."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _signal_rows(
    columns: dict[str, np.ndarray], signal: SignalSection, rows: slice, teacher: Teacher, vocab_size: int
) -> cache.TopK | cache.Hidden | cache.Full:
    if signal.signal in ("topk", "nucleus"):
        ids, logprobs = columns["signal_ids"][rows], columns["signal_logprobs"][rows]
        return cache.TopK(ids, logprobs, columns["log_tail_mass"][rows], temperature=1.0)
    hidden = columns["signal_hidden"][rows]
    dtype = "bfloat16" if hidden.dtype == np.uint16 else "float32"
    if signal.signal == "hidden":
        return cache.Hidden(hidden, dtype)
    return cache.Full(full_logits(hidden, teacher.head, vocab_size), dtype)


def full_logits(hidden: np.ndarray, head: Head, vocab_size: int) -> np.ndarray:
    """The logits [T, V] of one rollout in the teacher's dtype: one row of the batch at a time."""
    states = torch.from_numpy(hidden)
    states = states.view(torch.bfloat16) if hidden.dtype == np.uint16 else states
    states = states.to(head.weight.device)
    prepared = prepare_head(head, states, vocab_size)
    return to_numpy(prepared.logits(states.to(prepared.weight_Vd.dtype)).to(states.dtype))


def teacher_head(head: Head, vocab_size: int) -> cache.TeacherHead:
    """The head as a `hidden` cache stores it, cut to the shared vocabulary."""
    dtype = "bfloat16" if head.weight.dtype == torch.bfloat16 else "float32"
    bias = None if head.bias is None else to_numpy(head.bias[:vocab_size].float())
    return cache.TeacherHead(
        to_numpy(head.weight[:vocab_size]), dtype, bias=bias, scale=head.scale, softcap=head.softcap or 0.0
    )


def _record(
    row: PlannedRow, completion: Completion, author: Author, columns: dict[str, np.ndarray],
    signal: cache.TopK | cache.Hidden | cache.Full,
) -> cache.Record:  # fmt: skip
    return cache.Record(
        row_id=row.row_id, prompt_id=row.prompt.prompt_id, occurrence=row.occurrence, sample_index=row.sample_index,
        refresh_index=row.refresh_index, run_id=author.run_id, policy_step=author.policy_step,
        policy_hash=author.policy_hash, finish_reason=completion.finish_reason, prompt_text=row.prompt.text,
        completion_text=author.tokenizer.decode(completion.ids, skip_special_tokens=True),
        prompt_ids=row.prompt.ids, completion_ids=completion.ids, behaviour_logprobs=completion.logprobs,
        behaviour_entropy=completion.entropy, signal=signal, **columns,
    )  # fmt: skip
