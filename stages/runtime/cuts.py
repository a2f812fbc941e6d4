"""Completions that reached max_new_tokens before an end: how many, and how that is said everywhere."""

from __future__ import annotations

from collections.abc import Mapping


def cut_share(finish_reasons: Mapping[str, int]) -> float | None:
    """The share of `length` among counted finish reasons; None without any."""
    rows = sum(finish_reasons.values())
    return finish_reasons.get("length", 0) / rows if rows else None


def cut_sentence(share: float, what: str = "completions") -> str:
    """`61 % of completions were cut at max_new_tokens`"""
    percent = f"{100 * share:.0f}" if share == 0 or share >= 0.005 else "under 1"
    return f"{percent} % of {what} were cut at max_new_tokens"
