"""The score-function estimate of the reverse KL at one sampled token."""

import math

from jaxtyping import Float
from torch import Tensor

from dualkl.logprobs import LEAST_LOGPROB


def importance_ratio(
    student_logprobs: Float[Tensor, " N"], behaviour_logprobs: Float[Tensor, " N"], cap: float
) -> Float[Tensor, " N"]:
    """min(p(y) / μ(y), cap), from logprobs in nats. Truncation biases the estimate; cap = inf does not."""
    return (student_logprobs - behaviour_logprobs).clamp(max=math.log(cap)).exp()


def sampled_reverse_kl(
    student_logprobs: Float[Tensor, " N"],
    teacher_logprobs: Float[Tensor, " N"],
    behaviour_logprobs: Float[Tensor, " N"],
    reverse_kl: Float[Tensor, " N"],
    cap: float,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return the sampled reverse KL and its advantage at tokens y ~ μ, in nats.

    With l = ln p(y) - ln q(y) and w = min(p(y) / μ(y), cap), the value is w l, and the advantage is A = w (l
    - R). For cap = inf both are unbiased: E[w l] = KL(p || q), and A (1[j = y] - p_j) estimates dR/dz_j.
    Subtracting the exact R as baseline (arXiv 2605.07865) keeps the mean and about halves the variance.
    """
    ratio = importance_ratio(student_logprobs, behaviour_logprobs, cap)
    log_ratio = student_logprobs - teacher_logprobs.clamp(min=LEAST_LOGPROB)
    return ratio * log_ratio, ratio * (log_ratio - reverse_kl)
