"""Code shared by both loss kernels: logits from raw products, gate, mixed loss, gradient per outcome.

One program processes one row in tiles of [LANES, 4] columns. Each lane keeps its own running maximum and
sums, so the loop needs no synchronisation; lanes are reduced once, at the end of the row. Four columns per
lane make one 16-byte load.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-1e30)
"""ln 0, as in `dualkl.logprobs`: finite, to avoid NaN."""
VECTOR = tl.constexpr(4)
SOFT = tl.constexpr(0)
HARD = tl.constexpr(1)
FIXED = tl.constexpr(2)
RKL = tl.constexpr(0)
FKL = tl.constexpr(1)
GATE = tl.constexpr(2)
LOSS = tl.constexpr(3)
STUDENT_LOGPROB = tl.constexpr(4)
STUDENT_LOG_TAIL = tl.constexpr(5)
FLOORED = tl.constexpr(6)


@triton.jit
def at_least(x, bound):
    """max(x, bound), propagating NaN."""
    return tl.where(x < bound, bound, x)


@triton.jit
def tanh(x):
    """tanh to about 1 ulp of float32 (Cephes' tanhf); e^2x alone loses relative accuracy for small x."""
    square = x * x
    poly = -5.70498872745e-3
    poly = poly * square + 2.06390887954e-2
    poly = poly * square - 5.37397155531e-2
    poly = poly * square + 1.33314422036e-1
    poly = poly * square - 3.33332819422e-1
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, poly * square * x + x, tl.where(x < 0, -large, large))


@triton.jit
def activate(raw, bias_ptr, offsets, valid, inner, outer, CAPPED: tl.constexpr):
    """Return (logits at the loss's temperature, their slope) from raw = hidden @ weight.T.

    Logits are inner (raw + bias), or outer tanh(inner (raw + bias)) with a cap. The slope omits the head's
    constant factor: 1, or 1 - tanh².
    """
    x = raw
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offsets, mask=valid, other=0.0)
    x *= inner
    slope = 1.0
    if CAPPED:
        x = tanh(x)
        slope = 1.0 - x * x
        x *= outer
    return x, slope


@triton.jit
def mix(
    rkl,
    fkl,
    cross_entropy,
    logp_y,
    teacher_logp_y,
    behaviour_logp_y,
    tau,
    alpha,
    fixed,
    log_cap,
    GATING: tl.constexpr,
    MC: tl.constexpr,
    ARGMAX: tl.constexpr,
):
    """Return (λ, loss, advantage) of one row: scalar version of `dualkl.gates` and `dualkl.estimators`."""
    if GATING == SOFT:
        gate = 1.0 / (1.0 + tl.exp(-alpha * (tau - rkl)))
    elif GATING == HARD:
        gate = tl.where(rkl <= tau, 1.0, 0.0)
    else:
        gate = rkl * 0.0 + fixed
    reverse = rkl
    forward = fkl
    advantage = rkl * 0.0
    if MC:
        log_weight = logp_y - behaviour_logp_y
        weight = tl.exp(tl.where(log_weight > log_cap, log_cap, log_weight))
        log_ratio = logp_y - at_least(teacher_logp_y, LEAST)
        reverse = weight * log_ratio
        advantage = weight * (log_ratio - rkl)
    if ARGMAX:
        forward = cross_entropy
    return gate, gate * reverse + (1.0 - gate) * forward, advantage


@triton.jit
def outcome_gradient(p, q, centred, hit, reverse, forward, onehot, MC: tl.constexpr, ARGMAX: tl.constexpr):
    """reverse p (l - R) + forward (p - q) per outcome, with l - R in `centred`.

    MC replaces the first term by -onehot p (the caller adds the one-hot); ARGMAX replaces q by 1[hit].
    """
    target = q
    if ARGMAX:
        target = tl.where(hit, 1.0, 0.0)
    first = reverse * (p * centred)
    if MC:
        first = -onehot * p
    return first + forward * (p - target)
