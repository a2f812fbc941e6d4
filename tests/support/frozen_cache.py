"""The frozen caches in tests/data, one for each signal kind, and the script that generates them.

    python -m tests.support.frozen_cache FOLDER    # writes caches to FOLDER/<kind>, with their expected.json

Once a version is released, its committed files are never regenerated: they represent users' caches.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import cache
from tests.support.cache_samples import head, write

FROZEN = Path(__file__).resolve().parents[1] / "data"
CACHES = (
    "cache_v1/topk",
    "cache_v1/nucleus",
    "cache_v1/hidden",
    "cache_v1/full",
)
NUMBERS = range(1, 5)


def make(root: Path, kind: str) -> None:
    """Write four rows of two to five tokens as one unit, and the expected result of reading them."""
    write(root, NUMBERS, kind)
    snapshot = cache.open(root)
    expected: dict[str, Any] = {"rows": [readable(record) for record in snapshot], "head": None}
    if kind == "hidden":
        own = head()
        assert own.bias is not None
        expected["head"] = {
            "shape": list(own.weight.shape),
            "dtype": own.dtype,
            "scale": own.scale,
            "softcap": own.softcap,
            "first_row": own.weight[0].tolist(),
            "bias": _json(own.bias[:5]),
        }
    rows = ",\n".join(json.dumps(row) for row in expected["rows"])
    (root / "expected.json").write_text(f'{{"head": {json.dumps(expected["head"])}, "rows": [\n{rows}\n]}}\n')


def readable(record: cache.Record) -> dict[str, object]:
    """Every field as JSON, without empty signal slots; masses and logprobs in nats."""
    fields = {name: _json(value) for name, value in vars(record).items() if name != "signal"}
    signal = record.signal
    if isinstance(signal, cache.TopK):
        kept = signal.ids >= 0
        return fields | {
            "signal": {
                "temperature": signal.temperature,
                "ids": [ids[own].tolist() for ids, own in zip(signal.ids, kept, strict=True)],
                "logprobs": [_json(row[own]) for row, own in zip(signal.logprobs, kept, strict=True)],
                "log_tail_mass": _json(signal.log_tail_mass),
            }
        }
    assert signal is not None
    name = "states" if isinstance(signal, cache.Hidden) else "logits"
    return fields | {"signal": {"dtype": signal.dtype, name: getattr(signal, name).tolist()}}


def _json(value: object) -> object:
    """Floats with nine digits, which determine a float32 exactly; -inf as null."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind == "i":
        return value.tolist()
    return [None if np.isneginf(number) else float(f"{number:.9g}") for number in value.tolist()]


if __name__ == "__main__":
    for kind in ("topk", "nucleus", "hidden", "full"):
        make(Path(sys.argv[1]) / kind, kind)
