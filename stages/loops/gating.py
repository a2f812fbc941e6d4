"""The gate in stage two: each step's threshold, and logged statistics of λ and its divergence D.

Statistics are summed on the device, forward by forward, and reach the host with the step's other figures.
An adaptive threshold depends only on histograms of D over the tokens of earlier steps. These are counts:
their sums do not depend on how a step is split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualkl import DualKLOutput, TopKTeacher, gate_statistics
from dualkl.gate_statistics import NUM_SUMS, divergence_counts, figures, group_sums, means
from dualkl.thresholds import BINS_PER_DECADE, LEAST_DIVERGENCE, AdaptiveTau, adapt
from stages.data.alignment import queued
from stages.data.batches import MicroBatch
from stages.data.pool import Pool
from stages.runtime.config import Config

POSITION_BOUNDS = (16, 64, 256)
POSITIONS = ("0-15", "16-63", "64-255", "256+")
"""Number of completion tokens before the scored one."""
AGE_BOUNDS = (4, 16, 64)
AGES = ("0-3", "4-15", "16-63", "64+", "other runs")
"""Optimizer steps since the weights that wrote the row; rows of other runs have no age."""
NUM_GROUPS = len(AGES) * len(POSITIONS)
LENGTH = gate_statistics.LENGTH + NUM_GROUPS * NUM_SUMS
SIDES = ("rkl_below", "rkl_above", "fkl_below", "fkl_above")
MASSES = ("student_support_mass", "teacher_support_mass")
LOGGED_BINS_PER_DECADE = 4
DIGITS = 6


def starting(config: Config, state: dict[str, float]) -> AdaptiveTau | None:
    """The adaptive threshold from a checkpoint's `state`, or a new one; None if τ does not adapt.

    It lives on the host, which reads the statistics once a step anyway.
    """
    if not config.loss.tau_share:
        return None
    return AdaptiveTau.from_state(state) if state else AdaptiveTau.starting_at(config.loss.tau)


def threshold(config: Config, adaptive: AdaptiveTau | None) -> float | None:
    """τ of the next step, nats; None with a constant weight."""
    if not config.loss.has_threshold:
        return None
    return config.loss.tau if adaptive is None else float(adaptive.tau)


def groups_of(
    pool: Pool, step: int, keys: Sequence[str], lengths: Sequence[int], device: torch.device
) -> Tensor:
    """Group of each scored token of these rows, by age at 0-based `step` and position in the completion."""
    ages = np.array([pool.ages[key] for key in keys])
    of_age = np.digitize(ages + step - pool.opened_at, AGE_BOUNDS)
    of_age[ages < 0] = len(AGES) - 1
    of_position = np.digitize(np.concatenate([np.arange(length) for length in lengths]), POSITION_BOUNDS)
    groups_N = np.repeat(of_age, lengths) * len(POSITIONS) + of_position
    return queued(groups_N.astype(np.uint8), device)


def statistics_of(config: Config, out: DualKLOutput, batch: MicroBatch, groups: Tensor) -> Tensor:
    """LENGTH counts and sums of one forward, float64, on its device."""
    divergence_N = {"rkl": out.rkl, "fkl": out.fkl, "teacher_entropy": batch.teacher_entropy}[
        config.loss.gate_on
    ]
    return gate_statistics.gate_statistics(
        out,
        math.inf if batch.tau is None else batch.tau,
        divergence=divergence_N,
        teacher_log_tail_mass=batch.teacher.log_tail_mass if isinstance(batch.teacher, TopKTeacher) else None,
        groups=groups,
        num_groups=NUM_GROUPS,
    )


def adapted(config: Config, adaptive: AdaptiveTau | None, statistics: Tensor) -> AdaptiveTau | None:
    """The next step's threshold, given the last step's statistics, summed over all processes."""
    if adaptive is None:
        return None
    loss = config.loss
    assert isinstance(loss.gating, str)
    return adapt(
        adaptive,
        divergence_counts(statistics),
        share=loss.tau_share,
        gating=loss.gating,
        alpha=loss.alpha,
    )


def step_figures(statistics: Tensor, tau: float | None) -> dict[str, float | None]:
    """Gate figures of a `step` record: means over the step's tokens; None if there are no tokens.

    `rkl`, `fkl`, `gate` (λ) and `share_floored`. With a threshold: `tau`, and both KLs on its two sides
    (`*_below`: D <= τ). With top-k rows: student and teacher probability of the kept ids.
    """
    found = figures(statistics)
    chosen = {"rkl": "rkl", "fkl": "fkl", "gate": "gate_mean", "share_floored": "floored_share"}
    chosen |= {name: name for name in (*(SIDES if tau is not None else ()), *MASSES)}
    values: dict[str, Any] = {name: found.get(key) for name, key in chosen.items()}
    return values if tau is None else {"tau": tau, **values}


def gate_record(statistics: Tensor, tau: float | None) -> dict[str, Any]:
    """Figures of a `gate` record: histograms of λ and D, and means by position and by age.

    `gate_histogram`: tokens in equal bins of λ in [0, 1]. `divergence_histogram`: tokens below
    `histogram_from` nats, then in `histogram_bins_per_decade` bins per decade of D; the last is unbounded.
    Tables omit groups without tokens.
    """
    found = figures(statistics)
    fine_B = np.array(found["divergence_histogram"])
    width = BINS_PER_DECADE // LOGGED_BINS_PER_DECADE
    inner = fine_B[1:-1].reshape(-1, width).sum(1).tolist()
    sums_APC = group_sums(statistics, NUM_GROUPS).view(len(AGES), len(POSITIONS), NUM_SUMS)
    return {
        **({} if tau is None else {"tau": tau}),
        "gate_histogram": found["gate_histogram"],
        "divergence_histogram": [int(fine_B[0]), *inner, int(fine_B[-1])],
        "histogram_from": LEAST_DIVERGENCE,
        "histogram_bins_per_decade": LOGGED_BINS_PER_DECADE,
        "by_position": _table(POSITIONS, sums_APC.sum(0), tau is not None),
        "by_age": _table(AGES, sums_APC.sum(1), tau is not None),
    }


def _table(names: Sequence[str], sums_GC: Tensor, has_threshold: bool) -> dict[str, dict[str, float]]:
    """Tokens, mean λ, both KLs and the share with D > τ of each non-empty group."""
    columns = {"gate": "gate_mean", "rkl": "rkl", "fkl": "fkl"}
    columns |= {"share_forward": "share_above"} if has_threshold else {}
    table = {}
    for name, sums_C in zip(names, sums_GC, strict=True):
        if found := means(sums_C):
            shown = {column: float(f"{found[key]:.{DIGITS}g}") for column, key in columns.items()}
            table[name] = {"tokens": int(found["positions"]), **shown}
    return table
