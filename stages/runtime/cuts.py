"""Share of completions cut at max_new_tokens, and the sentence that reports it."""

from __future__ import annotations

from collections.abc import Mapping


def cut_share(finish_reasons: Mapping[str, int]) -> float | None:
    """Share of `length` among counted finish reasons; None if the counts are empty."""
    rows = sum(finish_reasons.values())
    return finish_reasons.get("length", 0) / rows if rows else None


def cut_sentence(share: float, what: str = "completions") -> str:
    """E.g. `61 % of completions were cut at max_new_tokens`."""
    percent = f"{100 * share:.0f}" if share == 0 or share >= 0.005 else "under 1"
    return f"{percent} % of {what} were cut at max_new_tokens"
