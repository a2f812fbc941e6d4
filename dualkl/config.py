"""Settings of the loss, validated on construction."""

from dataclasses import dataclass
from typing import Literal

TAIL_FLOOR = 1e-8
"""Default minimum probability of the teacher's tail bucket."""

_CHOICES = {
    "gating": ("soft", "hard", "fixed"),
    "rkl": ("exact", "mc"),
    "fkl": ("full", "argmax"),
    "objective": ("gated", "jsd"),
    "gate_on": ("rkl", "fkl", "teacher_entropy"),
}


@dataclass(frozen=True)
class DualKLConfig:
    """Settings of `dual_kl`. Divergences are in nats.

    Attributes:
        tau: reverse KL at which the gate is one half (soft) or closes (hard); can be overridden per `dual_kl`
            call.
        alpha: steepness of the soft gate per nat. With alpha * tau < 4 the gate is close to a constant mix.
        gating: "soft" λ = sigmoid(alpha (tau - D)); "hard" λ = 1[D <= tau]; "fixed" λ = mix.
        mix: weight of the reverse KL under gating="fixed"; β under objective="jsd".
        rkl: "exact" sums over the vocabulary; "mc" is the score-function estimate at the sampled token.
        fkl: "full" forward KL; "argmax" cross-entropy on the teacher's most likely token (lowers entropy).
        temperature: divides both logits. No T² factor: the gradient with respect to the logits is g / T.
        importance_cap: upper bound of the importance ratio for rkl="mc"; inf leaves it unbiased.
        tail_floor: minimum mass of the teacher's tail bucket; rows below it are reported as floored.
        vocab_size: cut both vocabularies to this many ids before every softmax; None cuts nothing.
        objective: "gated" mixes the two divergences; "jsd" is the generalised Jensen-Shannon divergence of
            arXiv 2306.13649, β KL(teacher || m) + (1 - β) KL(student || m) with m = β teacher + (1 - β)
            student and β = mix in (0, 1). "jsd" requires gating="fixed", rkl="exact" and fkl="full".
        gate_on: the gate's D: "rkl" R, "fkl" F, or "teacher_entropy", the entropy of the (smoothed) teacher.
            For a top-k teacher it is the entropy of the kept ids and tail bucket, a lower bound, unless the
            full entropy is passed to `dual_kl`.
        teacher_smoothing: ε in [0, 1): replaces the teacher by (1 - ε) q + ε / V, with V the vocabulary after
            the cut. Exact for dense teachers. For a top-k teacher, the tail bucket gets the uniform share of
            all ids outside, before flooring. R and F refer to the smoothed teacher. Pass sampled tokens'
            teacher logprobs unsmoothed; they are smoothed too.

    objective="jsd", gate_on other than "rkl" and teacher_smoothing > 0 run in plain PyTorch on every device;
    the Triton kernels handle all other settings.

    Raises:
        ValueError: an unknown choice, a number out of range, or an incompatible combination of settings.
    """

    tau: float = 1.0
    alpha: float = 5.0
    gating: Literal["soft", "hard", "fixed"] = "soft"
    mix: float = 0.5
    rkl: Literal["exact", "mc"] = "exact"
    fkl: Literal["full", "argmax"] = "full"
    temperature: float = 1.0
    importance_cap: float = 5.0
    tail_floor: float = TAIL_FLOOR
    vocab_size: int | None = None
    objective: Literal["gated", "jsd"] = "gated"
    gate_on: Literal["rkl", "fkl", "teacher_entropy"] = "rkl"
    teacher_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}.")
        _check_range("tau", self.tau, self.tau >= 0, "a number of nats >= 0")
        _check_range("alpha", self.alpha, self.alpha >= 0, "a number >= 0")
        _check_range("mix", self.mix, 0 <= self.mix <= 1, "a number in [0, 1]")
        check_temperature(self.temperature)
        _check_range(
            "importance_cap", self.importance_cap, self.importance_cap > 0, "a number > 0 (inf is allowed)"
        )
        _check_range("tail_floor", self.tail_floor, 0 <= self.tail_floor < 1, "a probability in [0, 1)")
        if self.vocab_size is not None:
            _check_range("vocab_size", self.vocab_size, self.vocab_size >= 1, "a number of ids >= 1, or None")
        _check_range(
            "teacher_smoothing",
            self.teacher_smoothing,
            0 <= self.teacher_smoothing < 1,
            "a probability in [0, 1)",
        )
        if self.gating == "fixed" and self.gate_on != "rkl":
            raise ValueError(
                f"gate_on is {self.gate_on!r}, but has no effect with gating 'fixed'; leave it at 'rkl'."
            )
        if self.objective == "jsd":
            _check_range(
                "mix", self.mix, 0 < self.mix < 1, "β in (0, 1) under objective 'jsd', which is 0 at 0 and 1"
            )
            for name, needed in (("gating", "fixed"), ("rkl", "exact"), ("fkl", "full")):
                value = getattr(self, name)
                if value != needed:
                    raise ValueError(f"{name} is {value!r}; objective 'jsd' requires {needed!r}.")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless 0 < temperature < inf."""
    _check_range("temperature", temperature, 0 < temperature < float("inf"), "a finite number > 0")


def _check_range(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; expected {expected}.")
