"""The teacher's distribution in its three forms, and their checks.

Shape suffixes: N positions, V vocabulary after the cut, K kept ids, d / D width of student / teacher.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualkl.checks import check_integers, check_shape, cut_vocabulary, outside
from dualkl.heads import Head, PreparedHead, as_head, prepare_head, statistics_dtype
from dualkl.logprobs import log_normalise_, smooth


@dataclass(frozen=True, eq=False)
class LogitsTeacher:
    """A teacher given by its logits, before temperature and vocabulary cut."""

    logits: Float[Tensor, "N V"]


@dataclass(frozen=True, eq=False)
class HiddenTeacher:
    """A teacher given by hidden states and a head: the full distribution from D numbers per position."""

    hidden: Float[Tensor, "N D"]
    lm_head: Float[Tensor, "V D"] | Head


@dataclass(frozen=True, eq=False)
class TopKTeacher:
    """A teacher given by its most likely ids and the mass of all others (the tail bucket).

    Attributes:
        ids: kept ids, the most likely in slot 0; empty slots hold -1 and come last.
        logprobs: nats, normalised together with the tail, never over the kept ids alone; ignored in empty
            slots.
        log_tail_mass: ln of the mass outside the kept ids, nats; -inf if all ids are kept.
        temperature: temperature of the logprobs and tail.
    """

    ids: Int[Tensor, "N K"]
    logprobs: Float[Tensor, "N K"]
    log_tail_mass: Float[Tensor, " N"]
    temperature: float = 1.0


Teacher = LogitsTeacher | HiddenTeacher | TopKTeacher


@dataclass(frozen=True, eq=False)
class Sampled:
    """Sampled tokens and their logprobs in nats.

    Attributes:
        ids: the sampled token of each position.
        teacher_logprobs: under the teacher, at the loss's temperature and after its vocabulary cut.
        behaviour_logprobs: under the true sampling distribution, at the sampling temperature.
    """

    ids: Int[Tensor, " N"]
    teacher_logprobs: Float[Tensor, " N"]
    behaviour_logprobs: Float[Tensor, " N"]


class DenseTarget:
    """Computes a dense teacher's logits chunk by chunk, in the statistics dtype and at a temperature.

    With `smoothing`, returns the logprobs of (1 - smoothing) q + smoothing / V instead.
    """

    def __init__(
        self,
        teacher: LogitsTeacher | HiddenTeacher,
        num_ids: int,
        temperature: float,
        like: Tensor,
        smoothing: float = 0.0,
    ) -> None:
        self._head: PreparedHead | None = None
        if isinstance(teacher, HiddenTeacher):
            self._source = teacher.hidden.detach()
            self._head = prepare_head(teacher.lm_head, teacher.hidden, num_ids)
        else:
            self._source = teacher.logits.detach()[:, :num_ids]
        self._temperature = temperature
        self._smoothing, self._num_ids = smoothing, num_ids
        self._dtype = statistics_dtype(like)

    def logits(self, rows: slice, active_N1: Tensor | None) -> Tensor:
        """Return logits / temperature [rows, V], newly allocated; inactive rows are computed from zeros."""
        source = self._source[rows]
        if active_N1 is not None:
            source = torch.where(active_N1, source, 0)
        if self._head is None:
            logits_NV = source.to(self._dtype, copy=True)
        else:
            logits_NV = self._head.logits(source.to(self._head.weight_Vd.dtype)).to(self._dtype)
        if self._temperature != 1.0:
            logits_NV.div_(self._temperature)
        return (
            smooth(log_normalise_(logits_NV), self._smoothing, 1 / self._num_ids)
            if self._smoothing
            else logits_NV
        )


def support_tensor(teacher: Teacher) -> Tensor:
    """Return the tensor that holds the teacher's distribution (used for device checks)."""
    if isinstance(teacher, LogitsTeacher):
        return teacher.logits
    return teacher.hidden if isinstance(teacher, HiddenTeacher) else teacher.logprobs


def shared_vocabulary(head: Head, teacher: Teacher, vocab_size: int | None) -> int:
    """Return the vocabulary size that student and teacher are cut to."""
    sizes = {"student's head": head.weight.shape[0]}
    if isinstance(teacher, HiddenTeacher):
        sizes["teacher's head"] = as_head(teacher.lm_head).weight.shape[0]
    elif isinstance(teacher, LogitsTeacher):
        check_shape("teacher.logits", teacher.logits, (None, None))
        sizes["teacher's logits"] = teacher.logits.shape[1]
    return cut_vocabulary(vocab_size, sizes)


def check_teacher(teacher: Teacher, num_rows: int, temperature: float) -> None:
    """Raise ValueError unless the teacher's shapes match `num_rows` and its temperature is the loss's."""
    if isinstance(teacher, LogitsTeacher):
        check_shape("teacher.logits", teacher.logits, (num_rows, None))
    elif isinstance(teacher, HiddenTeacher):
        check_shape("teacher.hidden", teacher.hidden, (num_rows, as_head(teacher.lm_head).weight.shape[1]))
    else:
        check_shape("teacher.ids", teacher.ids, (num_rows, None))
        check_integers("teacher.ids", teacher.ids)
        check_shape("teacher.logprobs", teacher.logprobs, tuple(teacher.ids.shape))
        check_shape("teacher.log_tail_mass", teacher.log_tail_mass, (num_rows,))
        if teacher.ids.shape[1] == 0:
            raise ValueError("teacher.ids has no slots; expected at least one kept id a position.")
        if teacher.temperature != temperature:
            raise ValueError(
                f"The teacher's top-k logprobs are at temperature {teacher.temperature}, the loss is at"
                f" {temperature}; use the same temperature, or score the rollouts again."
            )


def check_topk_values(teacher: TopKTeacher, num_ids: int, active_N: Tensor | None = None) -> None:
    """Raise ValueError for the first active row that is not a distribution over distinct ids and a tail.

    Reads values, and therefore synchronises.
    """
    ids_NK = teacher.ids if active_N is None else torch.where(active_N[:, None], teacher.ids, -1)
    kept_NK = ids_NK >= 0
    sorted_NK = _sorted(ids_NK)
    logprobs_NK = teacher.logprobs.float().masked_fill(~kept_NK, -torch.inf)
    mass_N = logprobs_NK.exp().sum(1) + teacher.log_tail_mass.float().exp()
    _refuse(outside(ids_NK, num_ids), f"holds an id outside the vocabulary of {num_ids} ids")
    _refuse(
        kept_NK[:, 1:] & ~kept_NK[:, :-1], "has an empty slot (id -1) before a kept id; expected them last"
    )
    _refuse((sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0), "keeps the same id twice")
    _refuse(logprobs_NK[:, 1:] > logprobs_NK[:, :1] + 1e-4, "does not have its most likely id in slot 0")
    _refuse(
        (kept_NK[:, 0] & ~((mass_N - 1).abs() <= 1e-4))[:, None],
        "has masses that do not add up to 1 (kept ids and tail: {value:.6f}, tolerance 1e-4); "
        "normalise the kept ids together with the tail",
        mass_N,
    )


def _sorted(ids_NK: Tensor) -> Tensor:
    """The ids of each row in order. On a CPU, numpy sorts short rows about 20 times as fast as torch."""
    if ids_NK.device.type != "cpu":
        return ids_NK.sort(1).values
    array = ids_NK.clone().numpy()
    array.sort(axis=1)
    return torch.from_numpy(array)


def _refuse(bad_NK: Tensor, what: str, value_N: Tensor | None = None) -> None:
    if not bad_NK.any():
        return
    row = int(bad_NK.any(1).nonzero()[0])
    value = 0.0 if value_N is None else float(value_N[row])
    raise ValueError(f"Row {row} of the top-k teacher {what.format(value=value)}.")


def smooth_topk(teacher: TopKTeacher, num_ids: int, epsilon: float, dtype: torch.dtype) -> TopKTeacher:
    """Mix a top-k teacher with the uniform distribution over `num_ids`; the tail gets the outside share."""
    num_outside_N = (num_ids - (teacher.ids >= 0).sum(1)).to(dtype)
    return TopKTeacher(
        teacher.ids,
        smooth(teacher.logprobs.detach().to(dtype), epsilon, 1 / num_ids),
        smooth(teacher.log_tail_mass.detach().to(dtype), epsilon, num_outside_N / num_ids),
        teacher.temperature,
    )


def select_rows(teacher: TopKTeacher, rows: slice, active_N1: Tensor | None) -> TopKTeacher:
    """Select positions of a top-k teacher; inactive rows become empty."""
    ids_NK = teacher.ids[rows]
    if active_N1 is not None:
        ids_NK = torch.where(active_N1, ids_NK, -1)
    return TopKTeacher(ids_NK, teacher.logprobs[rows], teacher.log_tail_mass[rows], teacher.temperature)
