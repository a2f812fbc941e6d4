"""The loss's settings refuse what they cannot mean."""

from typing import Any

import pytest

from dualkl import DualKLConfig


def test_the_defaults_are_the_published_ones() -> None:
    config = DualKLConfig()
    assert (config.tau, config.alpha, config.gating, config.mix) == (1.0, 5.0, "soft", 0.5)
    assert (config.rkl, config.fkl, config.temperature) == ("exact", "full", 1.0)
    assert (config.importance_cap, config.tail_floor, config.vocab_size) == (5.0, 1e-8, None)
    assert (config.objective, config.gate_on, config.teacher_smoothing) == ("gated", "rkl", 0.0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gating", "sigmoid", "gating is 'sigmoid'; expected one of 'soft', 'hard', 'fixed'."),
        ("rkl", "k3", "rkl is 'k3'; expected one of 'exact', 'mc'."),
        ("fkl", "topk", "fkl is 'topk'; expected one of 'full', 'argmax'."),
        ("tau", -0.1, "tau is -0.1; expected a number of nats >= 0."),
        ("tau", float("nan"), "tau is nan; expected a number of nats >= 0."),
        ("alpha", -1.0, "alpha is -1.0; expected a number >= 0."),
        ("mix", 1.5, r"mix is 1.5; expected a number in \[0, 1\]."),
        ("temperature", 0.0, "temperature is 0.0; expected a finite number > 0."),
        ("temperature", float("inf"), "temperature is inf; expected a finite number > 0."),
        ("importance_cap", 0.0, r"importance_cap is 0.0; expected a number > 0 \(inf is allowed\)."),
        ("tail_floor", 1.0, r"tail_floor is 1.0; expected a probability in \[0, 1\)."),
        ("objective", "kl", "objective is 'kl'; expected one of 'gated', 'jsd'."),
        ("gate_on", "age", "gate_on is 'age'; expected one of 'rkl', 'fkl', 'teacher_entropy'."),
        ("teacher_smoothing", 1.0, r"teacher_smoothing is 1.0; expected a probability in \[0, 1\)."),
        ("vocab_size", 0, "vocab_size is 0; expected a number of ids >= 1, or None."),
    ],
)
def test_a_bad_setting_is_named_with_what_was_expected(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualKLConfig(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": 0.0}, r"mix is 0.0; expected β in \(0, 1\) under objective 'jsd', which is 0 at 0 and 1."),
        ({"mix": 1.0}, r"mix is 1.0; expected β in \(0, 1\)"),
        ({"gating": "soft"}, "gating is 'soft'; objective 'jsd' requires 'fixed'."),
        ({"rkl": "mc"}, "rkl is 'mc'; objective 'jsd' requires 'exact'."),
        ({"fkl": "argmax"}, "fkl is 'argmax'; objective 'jsd' requires 'full'."),
    ],
)
def test_settings_that_jensen_shannon_does_not_have_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DualKLConfig(**({"objective": "jsd", "gating": "fixed"} | changes))


def test_a_signal_for_a_gate_that_looks_at_none_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"gate_on is 'fkl', but has no effect with gating 'fixed'; leave it at 'rkl'\."
    ):
        DualKLConfig(gating="fixed", gate_on="fkl")
