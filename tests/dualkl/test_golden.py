"""`dual_kl` against recorded numbers: losses, gradients and gates that a refactoring must not change.

`python -m tests.dualkl.test_golden` records them again; do so only for a change that is meant to change the
loss.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dualkl.test_losses import METHODS, Case, gradients

GOLDEN = Path(__file__).with_name("golden_losses.json")
OTHERS: list[dict[str, Any]] = [
    {"objective": "jsd", "gating": "fixed", "mix": 0.3},
    {"teacher_smoothing": 0.1},
    {"gate_on": "fkl"},
    {"gate_on": "teacher_entropy"},
    {"gate_on": "teacher_entropy", "gating": "hard", "rkl": "mc", "teacher_smoothing": 0.1},
]
SETTINGS = {"-".join(f"{name}={value}" for name, value in s.items()): s for s in [*METHODS, *OTHERS]}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
# Matrix products round differently on other processors: a few units in the last place of float32.
TOLERANCES = {"float64": {"rtol": 1e-7, "atol": 1e-9}, "float32": {"rtol": 2e-5, "atol": 2e-6}}


def measured(kind: str, dtype: str, settings: dict[str, Any]) -> dict[str, list[float]]:
    """The loss, R, F and gate of every position; of each gradient its sum, its absolute sum and three
    entries.
    """
    case = Case(full_head=True, dtype=DTYPES[dtype])
    output = case.run(kind, case.config(**settings))
    numbers = {"loss": output.loss.reshape(1), "rkl": output.rkl, "fkl": output.fkl, "gate": output.gate}
    for name, gradient in zip(("hidden", "weight", "bias"), gradients(output.loss, case.leaves), strict=True):
        flat = gradient.double().flatten()
        entries = flat[[0, len(flat) // 2, len(flat) - 1]]
        numbers[name] = torch.cat([flat.sum()[None], flat.abs().sum()[None], entries])
    return {name: [float(f"{x:.12g}") for x in values.tolist()] for name, values in numbers.items()}


def named(key: str) -> Callable[[str], str]:
    """A message of `assert_close` that starts with the quantity."""
    return lambda text: f"{key}: {text}"


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
def test_losses_gradients_and_gates_are_the_recorded_ones(kind: str, dtype: str, name: str) -> None:
    recorded = json.loads(GOLDEN.read_text())[f"{kind} {dtype} {name}"]
    found = measured(kind, dtype, SETTINGS[name])
    assert found.keys() == recorded.keys()
    for key, values in recorded.items():
        wanted, actual = (torch.tensor(x, dtype=torch.float64) for x in (values, found[key]))
        torch.testing.assert_close(actual, wanted, **TOLERANCES[dtype], msg=named(key))


def record() -> None:
    """Write the numbers of the present code."""
    lines = [
        f"{json.dumps(f'{kind} {dtype} {name}')}: {json.dumps(measured(kind, dtype, settings))}"
        for kind in ("logits", "hidden", "topk")
        for dtype in DTYPES
        for name, settings in SETTINGS.items()
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
