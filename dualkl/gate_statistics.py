"""Gate statistics for logging: histograms of λ and D, divergences on either side of τ, mass on the kept ids.

`gate_statistics` returns one flat tensor of counts and sums on the device, without synchronising. Sum these
tensors over micro-batches and processes, then read the total on the host with `figures`, or per group with
`group_sums` and `means`.

Shape suffixes: N positions, B bins, G groups, C columns that are summed.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualkl.losses import DualKLOutput
from dualkl.thresholds import NUM_BINS, divergence_histogram

NUM_GATE_BINS = 20
SUMS = ("positions", "above_tau", "gate", "rkl_below", "rkl_above", "fkl_below", "fkl_above", "floored")
SUPPORT_SUMS = ("bucketed", "student_mass", "teacher_mass")
NUM_SUMS = len(SUMS) + len(SUPPORT_SUMS)
LENGTH = NUM_GATE_BINS + NUM_BINS + NUM_SUMS


@torch.no_grad()
def gate_statistics(
    out: DualKLOutput,
    tau: float | Float[Tensor, ""] | Float[Tensor, " N"],
    counted: Float[Tensor, " N"] | None = None,
    *,
    divergence: Float[Tensor, " N"] | None = None,
    teacher_log_tail_mass: Float[Tensor, " N"] | None = None,
    groups: Int[Tensor, " N"] | None = None,
    num_groups: int = 0,
) -> Float[Tensor, " length"]:
    """Float64 counts and sums over positions: LENGTH for all, then NUM_SUMS per group.

    Read them with `figures` and `group_sums`.

    Args:
        out: output of `dual_kl`.
        tau: the threshold it used.
        counted: positions where this is 0 are excluded (the loss's weights, optionally times a mask).
        divergence: the gate's D; defaults to R, as for gate_on="rkl".
        teacher_log_tail_mass: needed to report a top-k teacher's mass on its kept ids.
        groups: 0-based group of each position; positions outside [0, num_groups) belong to none. A NaN at a
            counted position propagates to every group.
    """
    divergence_N = out.rkl if divergence is None else divergence
    include_N = torch.ones_like(out.rkl, dtype=torch.bool) if counted is None else counted != 0
    bins_N = (out.gate * NUM_GATE_BINS).nan_to_num().long().clamp_(0, NUM_GATE_BINS - 1)
    gates_B = torch.zeros(NUM_GATE_BINS, dtype=torch.int64, device=out.rkl.device)
    gates_B.scatter_add_(0, bins_N, include_N.long())
    columns_CN = _columns(out, include_N, divergence_N > tau, teacher_log_tail_mass)
    divergences_B = divergence_histogram(divergence_N, include_N.double())
    parts = [gates_B.double(), divergences_B.double(), columns_CN.sum(1)]
    if groups is not None:
        names_G = torch.arange(num_groups, device=out.rkl.device)
        parts.append(((groups == names_G[:, None]).double() @ columns_CN.T).flatten())
    return torch.cat(parts)


def _columns(
    out: DualKLOutput, include_N: Tensor, is_above_N: Tensor, teacher_log_tail_mass: Tensor | None
) -> Float[Tensor, "C N"]:
    """Columns behind SUMS and SUPPORT_SUMS, float64; 0 where a position is excluded."""
    above_N, below_N = include_N & is_above_N, include_N & ~is_above_N
    columns = [(include_N, include_N), (above_N, above_N), (out.gate, include_N)]
    columns += [(out.rkl, below_N), (out.rkl, above_N), (out.fkl, below_N), (out.fkl, above_N)]
    columns += [(out.floored, include_N)]
    if out.student_log_tail_mass is not None and teacher_log_tail_mass is not None:
        masses = (-torch.expm1(out.student_log_tail_mass), -torch.expm1(teacher_log_tail_mass))
        columns += [(include_N, include_N), *((mass_N, include_N) for mass_N in masses)]
    else:
        columns += [(include_N, torch.zeros_like(include_N))] * len(SUPPORT_SUMS)
    return torch.stack([torch.where(mask_N, column_N.double(), 0) for column_N, mask_N in columns])


def divergence_counts(statistics: Float[Tensor, " length"]) -> Float[Tensor, " B"]:
    """Return the histogram of D from the statistics, as input to `dualkl.thresholds.adapt`."""
    return statistics[NUM_GATE_BINS : NUM_GATE_BINS + NUM_BINS]


def group_sums(statistics: Float[Tensor, " length"], num_groups: int) -> Float[Tensor, "G C"]:
    """Return the sums per group of statistics made with `groups`. Rows can be added; `means` reads one."""
    return statistics[LENGTH:].view(num_groups, NUM_SUMS)


def figures(statistics: Float[Tensor, " length"]) -> dict[str, float | list[int]]:
    """Return the statistics over all positions for logging; {} without positions.

    Synchronises with the device. Keys: those of `means`, `gate_histogram` (equal bins of [0, 1]) and
    `divergence_histogram` (edges: `dualkl.thresholds.bin_edges`).
    """
    counts = statistics[: NUM_GATE_BINS + NUM_BINS].tolist()
    found: dict[str, float | list[int]] = {**means(statistics[NUM_GATE_BINS + NUM_BINS : LENGTH])}
    if found:
        found["gate_histogram"] = [int(x) for x in counts[:NUM_GATE_BINS]]
        found["divergence_histogram"] = [int(x) for x in counts[NUM_GATE_BINS:]]
    return found


def means(sums: Float[Tensor, " C"]) -> dict[str, float]:
    """Convert NUM_SUMS sums to means over positions; {} without positions. Synchronises with the device.

    Keys: `positions` (count), `gate_mean`, `share_above` (positions with D > τ), `rkl` and `fkl` and their
    means at positions with D <= τ (`*_below`) and D > τ (`*_above`; nats, omitted if there are none),
    `floored_share`, `student_support_mass` and `teacher_support_mass` (probability on the kept ids; over
    positions with a top-k teacher).
    """
    total: dict[str, float] = dict(zip((*SUMS, *SUPPORT_SUMS), sums.tolist(), strict=True))
    num_all, num_above = total["positions"], total["above_tau"]
    if num_all == 0:
        return {}
    found = {
        "positions": num_all,
        "gate_mean": total["gate"] / num_all,
        "share_above": num_above / num_all,
        "floored_share": total["floored"] / num_all,
    }
    for name in ("rkl", "fkl"):
        found[name] = (total[f"{name}_below"] + total[f"{name}_above"]) / num_all
        if num_above < num_all:
            found[f"{name}_below"] = total[f"{name}_below"] / (num_all - num_above)
        if num_above:
            found[f"{name}_above"] = total[f"{name}_above"] / num_above
    if total["bucketed"]:
        found["student_support_mass"] = total["student_mass"] / total["bucketed"]
        found["teacher_support_mass"] = total["teacher_mass"] / total["bucketed"]
    return found
