"""The grid on which a top-k signal's logprobs are stored: gaps to the most likely id, fine near it and 1/16 nat apart far off.

A gap x in nats has code round(f(x)); f has slope 128 exp(−x/2) up to `_BEND_NATS` and 16 beyond, so that the step grows
as p^(−1/2), which spreads the error of a KL evenly over the ids, until it reaches `COARSEST_STEP_NATS`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cache.schema import Array, Float32

COARSEST_STEP_NATS = 1 / 16
_SCALE = 256  # f(x) = 256 (1 − exp(−x/2)) up to the bend
_BEND_CODE = 224
_BEND_NATS = 2 * np.log(8.0)
_LARGEST_CODE = 2**31 - 128  # what int32 holds and float32 represents: 1.3e8 nats


def codes_of(gaps: Float32) -> tuple[npt.NDArray[np.int32], Float32]:
    """The codes of gaps >= 0 (nats), monotone in the gap, and exp(−gap)."""
    root = np.exp(gaps * np.float32(-0.5))
    curve = _SCALE * (1 - root)
    line = gaps * np.float32(1 / COARSEST_STEP_NATS) + np.float32(_BEND_CODE - _BEND_NATS / COARSEST_STEP_NATS)
    code = np.where(root > np.float32(1 / 8), curve, line)
    return np.rint(np.minimum(code, _LARGEST_CODE)).astype(np.int32), root * root


def gaps_of(codes: npt.NDArray[np.int64]) -> tuple[Float32, Float32]:
    """The gaps (nats) that codes stand for, and exp(−gap); within half a step of what `codes_of` was given."""
    if codes.size and codes.max() >= len(_GAPS):
        gaps = _formula(codes).astype(np.float32)
        return gaps, np.exp(-gaps)
    return _GAPS.take(codes), _MASSES.take(codes)


def _formula(codes: Array) -> npt.NDArray[np.float64]:
    near = np.minimum(codes, _BEND_CODE)
    gaps: npt.NDArray[np.float64] = -2 * np.log1p(-near / _SCALE) + (codes - near) * COARSEST_STEP_NATS
    return gaps


_GAPS = _formula(np.arange(4096)).astype(np.float32)
_MASSES = np.exp(-_GAPS)
