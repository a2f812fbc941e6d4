"""The grids on which a top-k signal's logprobs are stored, as codes of gaps to the most likely id.

Codec version 2, which is written: even steps of `STEP_NATS`, so that a large gap is as exact as a small one. Version 1,
which is read: steps that grow as p^(−1/2) up to 1/16 nat. T tokens, K slots.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cache.schema import Float32

STEP_NATS = 1 / 256
_LARGEST_CODE = 2**31 - 128  # what int32 holds and float32 represents: 8.4e6 nats


def codes_of(gaps: Float32) -> npt.NDArray[np.int32]:
    """The codes of gaps >= 0 (nats), monotone in the gap."""
    return np.rint(np.minimum(gaps * np.float32(1 / STEP_NATS), np.float32(_LARGEST_CODE))).astype(np.int32)


def gaps_of(codes: npt.NDArray[np.int64]) -> Float32:
    """The gaps (nats) that codes stand for; within half a step of what `codes_of` was given."""
    return codes.astype(np.float32) * np.float32(STEP_NATS)


def gaps_of_version_1(codes: npt.NDArray[np.int64]) -> Float32:
    """The same for codec version 1."""
    near = np.minimum(codes, 224)
    gaps: Float32 = (-2 * np.log1p(-near / 256) + (codes - near) / 16).astype(np.float32)
    return gaps
