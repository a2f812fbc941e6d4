"""Load-time checks that every way the stages compute logits agrees with the model's own forward.

A path that disagrees is replaced by a slower correct one, with a report, or the model is rejected. The
model's forward of a single short row, in float32 and with attention windows of a few tokens, is compared with
(1) its forward of the first half of the row (causality), (2) padded rows through decoder and head, (3) packed
rows, (4) packed rows that share a prompt, (5) training mode, (6) the rollout engine. Effects of long rows are
not detected: rotary embeddings that change beyond a length, and windows that neither a config nor a module
names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Never, TypeVar

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from stages.data.alignment import Aligned, align
from stages.engine.decoder import plain_steps_logprobs
from stages.engine.hf_generate import HFGenerateEngine
from stages.engine.opening import choose_engine
from stages.engine.protocol import forced_logprobs
from stages.engine.slot_attention import check_served
from stages.models.dropout import pin_to_evaluation
from stages.models.float32 import float32_attention, in_float32, linear_by_parts, short_windows
from stages.models.packing import unshared_because
from stages.models.readout import EXACT, check_ids, decoder_of, note_readout, readout_of, relative_gap
from stages.runtime.distributed import say_once
from stages.runtime.errors import UserError, one_line

LONG, SHORT, PROMPT = 26, 9, 4  # tokens; beyond float32.WINDOW
FEW = 4  # tokens checked with `generate`, which is slow for models with a recurrent state but no kernels
WRITTEN = 5e-3  # nats; both sides in float32
CACHED = 2e-4  # nats; `generate` with a cache may exceed this, up to 4 times the gap without a cache
FLASH_SLACK = 4.0  # multiple of the model's own rounding, for kernels that need half precision
BY_CHUNKS = ("reformer",)
"""Architectures that attend within chunks whose size depends on the row, so short rows prove nothing."""
T = TypeVar("T")


@dataclass
class Subject:
    """A loaded model and how the stages compute with it; collective if `agree` is.

    `hidden`: batch -> decoder states; `full`: ids [1, T] -> states [T, d] and the model's own logits [T, V];
    `agree`: maximum over all ranks, so that all decide alike.
    """

    model: PreTrainedModel
    hidden: Callable[[Aligned], Tensor]
    full: Callable[[Tensor], tuple[Tensor, Tensor]]
    weights: tuple[Tensor, Tensor | None]
    exact: Callable[[], AbstractContextManager[None]] = in_float32
    agree: Callable[[float], float] = float
    side: str = "model"
    rows: list[np.ndarray] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)  # logits [T, V] of each row from `full`

    def __post_init__(self) -> None:
        first, other = (check_ids(self.model, LONG, seed)[0].cpu().numpy() for seed in (0, 1))
        self.rows = [first, first[:SHORT], other]

    @property
    def kind(self) -> str:
        return f"{self.side} of type {self.model.config.model_type}"

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @contextmanager
    def exactly(self) -> Iterator[None]:
        with float32_attention(self.model), self.exact(), short_windows(self.model):
            yield

    def aligned(self, packed: bool, shared: bool = False) -> Aligned:
        """The rows as a batch; `shared`: the first two have one prompt."""
        prompts, completions = [row[:PROMPT] for row in self.rows], [row[PROMPT:] for row in self.rows]
        return align(prompts, completions, 0, self.device, packed=packed, shared=shared)

    def found(self, packed: bool, shared: bool = False) -> list[Tensor]:
        """Logits of each row from `hidden` and the head."""
        aligned = self.aligned(packed, shared)
        states = self.hidden(aligned)
        parts = (
            [states[0][torch.from_numpy(own).to(states.device)] for own in aligned.packing.places()]
            if aligned.packing
            else states
        )
        return [self.logits(part[: len(row)]) for part, row in zip(parts, self.rows, strict=True)]

    def logits(self, hidden_Td: Tensor) -> Tensor:
        return readout_of(self.model)(linear_by_parts(hidden_Td, *self.weights))

    def gap(self, packed: bool, shared: bool = False) -> float:
        """Largest relative gap between `found` and `expected` logits."""
        gaps = [
            relative_gap(found, wanted)
            for found, wanted in zip(self.found(packed, shared), self.expected, strict=True)
        ]
        return self.agree(max(gaps))


def check_forwards(subject: Subject) -> None:
    """Measure the readout; `UserError` if the model is not causal, or padding or head change its logits."""
    if subject.model.config.model_type in BY_CHUNKS:
        raise UserError(
            f"a {subject.kind} cannot be used: a token's logits depend on how long its row is. Choose"
            " another model."
        )
    with subject.exactly():
        for row in subject.rows:
            ids = torch.from_numpy(row)[None].to(subject.device)
            hidden, logits = _tried(subject, partial(subject.full, ids))
            if subject.agree(float(logits.isnan().any())):
                raise UserError(
                    f"a {subject.kind} gave NaN or infinite values for a few token ids; check its weights"
                    " and its dtype."
                )
            if not subject.expected:
                note_readout(subject.model, hidden, logits, *subject.weights)
            subject.expected.append(logits.float())
        ahead = subject.agree(relative_gap(subject.expected[1], subject.expected[0][:SHORT]))
        padded = _tried(subject, lambda: subject.gap(packed=False))
    if not ahead < EXACT:
        raise UserError(
            f"a {subject.kind} cannot be used: its logits change by {ahead:.1%} when tokens are appended, so"
            " it is not causal. Choose a decoder-only model."
        )
    if not padded < EXACT:
        raise UserError(
            f"a {subject.kind} cannot be used: in padded batches the logits of its decoder and lm_head differ"
            f" by {padded:.1%} from its own forward of each row alone. Choose a model of another type."
        )


def packing_refused(subject: Subject) -> str:
    """Why packed rows cannot be used although the model seems to support them; "" if they are exact."""

    def gap() -> tuple[float, float]:
        if "flash" not in subject.model.config._attn_implementation:
            with subject.exactly():
                return EXACT, subject.gap(packed=True)
        autocast = torch.autocast(subject.device.type, torch.bfloat16)
        with torch.no_grad(), autocast, short_windows(subject.model):
            return FLASH_SLACK * subject.gap(packed=False) + EXACT, subject.gap(packed=True)

    return _refused(gap, "packed rows")


def sharing_refused(subject: Subject, padded_because: str) -> str:
    """Why packed rows cannot share prompts; "" if they are exact. `padded_because`: why nothing is packed."""

    def gap() -> tuple[float, float]:
        with subject.exactly():
            return EXACT, subject.gap(packed=True, shared=True)

    return unshared_because(subject.model, padded_because) or _refused(gap, "rows that share a prompt")


def _refused(gap: Callable[[], tuple[float, float]], what: str) -> str:
    """Why rows of this kind cannot be used; `gap` returns the largest gap allowed and the one found."""
    try:
        bound, found = gap()
    except UserError as error:
        return str(error).partition("; use --packing")[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{what} failed: {type(error).__name__}: {one_line(error)}"
    return "" if found < bound else f"{what} give other logits, by {found:.1%}"


def check_training(subject: Subject, model: PreTrainedModel | PeftModel, packed: bool) -> None:
    """Make training mode compute the same as evaluation mode; `UserError` if that is impossible."""

    def gap() -> float:
        model.train()
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout.eval()
        try:
            with subject.exactly():
                return _tried(subject, lambda: subject.gap(packed))
        finally:
            model.eval()

    if not gap() < EXACT:
        pin_to_evaluation(subject.model)
        if not (found := gap()) < EXACT:
            raise UserError(
                f"a {subject.kind} cannot be trained: in training mode its logits differ by {found:.1%} from"
                " those in evaluation mode, even with dropout off. Choose a student_model of another type."
            )


def forced_gap(
    subject: Subject,
    engine: Callable[[list[np.ndarray], list[np.ndarray]], list[np.ndarray]],
    num_tokens: int,
) -> float:
    """Largest difference, in nats, between an engine's and the model's logprobs of the rows' last tokens."""
    starts = [max(PROMPT, len(row) - num_tokens) for row in subject.rows]
    prompts, completions = (
        [row[:n] for row, n in zip(subject.rows, starts, strict=True)],
        [row[n:] for row, n in zip(subject.rows, starts, strict=True)],
    )
    gap = 0.0
    with subject.exactly():
        written = engine(prompts, completions)
    for found, logits, completion, start in zip(written, subject.expected, completions, starts, strict=True):
        targets = torch.from_numpy(completion).to(logits.device)[:, None]
        wanted = logits[start - 1 : -1].log_softmax(-1).gather(1, targets)[:, 0].cpu().numpy()
        distance = np.abs(found - wanted).max()
        gap = max(gap, float(distance) if np.isfinite(distance) else math.inf)
    return gap


def _tried(subject: Subject, forward: Callable[[], T]) -> T:
    try:
        return forward()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"a {subject.kind} cannot be used: its forward of a few token ids failed"
            f" ({type(error).__name__}: {one_line(error)}). Choose a decoder-only model that needs no other"
            " inputs."
        ) from error


def check_writing(subject: Subject, model: PreTrainedModel | PeftModel) -> None:
    """Select the rollout engine of `model` (with its adapters): the built-in one, or `generate`.

    If even `generate` gives wrong logprobs, `open_engine` raises later.
    """
    base = subject.model

    def slots(prompts: list[np.ndarray], completions: list[np.ndarray]) -> list[np.ndarray]:
        check_served(base, decoder_of(base))
        return plain_steps_logprobs(base, prompts, completions, subject.logits)

    def by_generate(use_cache: bool) -> Callable[..., list[np.ndarray]]:
        vocab_size = base.config.get_text_config().vocab_size
        return partial(forced_logprobs, HFGenerateEngine(model, use_cache), vocab_size=vocab_size)

    _, reason = _written(subject, slots, LONG)
    if not reason:
        return
    anew, why = _written(subject, by_generate(False), FEW)
    cached, why_not = _written(subject, by_generate(True), FEW)
    if not why_not and cached > max(CACHED, 4 * anew):
        why_not = f"its cached steps are {cached:.2g} nats off"
    if why and why_not:
        refused = (
            f"a {subject.kind} cannot write rollouts: {reason.rstrip('.')}; with transformers' `generate`,"
            f" {why}. Choose a student_model of another type."
        )
        choose_engine(model, partial(_refuse, refused))
        return
    choose_engine(model, partial(HFGenerateEngine, use_cache=not why_not))
    how = f"`generate` without a cache ({why_not.rstrip('.')})" if why_not else "`generate`"
    say_once(f"rollouts are written by transformers' {how}, which is slower, because {reason}")


def _refuse(sentence: str, _model: PreTrainedModel | PeftModel) -> Never:
    raise UserError(sentence)


def _written(subject: Subject, engine: Callable[..., list[np.ndarray]], num_tokens: int) -> tuple[float, str]:
    """Gap in nats over the rows' last `num_tokens`, and why the engine is unusable ("" if it is usable)."""
    try:
        gap = forced_gap(subject, engine, num_tokens)
    except UserError as error:
        return math.inf, str(error)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return math.inf, f"its decode step failed ({type(error).__name__}: {one_line(error)})"
    return gap, "" if gap < WRITTEN else f"its logprobs differ from those of a forward by {gap:.3g} nats"
