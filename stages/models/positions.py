"""Maximum sequence length of a model, from its config."""

from __future__ import annotations

from typing import Any

FOLLOW_LENGTH = ("dynamic", "longrope")


def positions_of(config: Any) -> int | None:
    """Maximum tokens per sequence: learned positions or range of scaled rotary embeddings; None: no limit.

    Frequencies that depend on the batch's longest row (`dynamic`, `longrope`) are valid up to the length at
    which they change.
    """
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limit = next(
        (value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0), None
    )
    attention = getattr(text, "attn_config", None)  # MPT's
    if limit is None or getattr(text, "alibi", False) or getattr(attention, "alibi", False):
        return None
    scalings = _scalings(text)
    if any(scaling.get("rope_type", scaling.get("type")) in FOLLOW_LENGTH for scaling in scalings):
        originals = [scaling.get("original_max_position_embeddings") for scaling in scalings]
        return next(
            (n for n in [*originals, getattr(text, "original_max_position_embeddings", None)] if n), limit
        )
    return max([limit, *(_reach(limit, scaling) for scaling in scalings)])


def _scalings(text: Any) -> list[dict[str, Any]]:
    """Rotary settings: one for all layers, or one per layer type."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]


def _reach(limit: int, scaling: dict[str, Any]) -> int:
    original = scaling.get("original_max_position_embeddings") or limit
    factor = scaling.get("factor") or 1.0
    return int(original * factor)
