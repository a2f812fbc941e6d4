"""The table of signal kinds. A kind is a class of signals; FORMAT.md specifies its packed form."""

from __future__ import annotations

from cache.matrices import Full, Hidden
from cache.schema import Record, Rules, Signal, check_columns, refuse
from cache.topk import TopK

KINDS: dict[str, type[Signal] | None] = {
    "none": None,  # not scored yet
    "topk": TopK,
    "nucleus": TopK,
    "hidden": Hidden,
    "full": Full,
}
CLASSES: dict[int, type[Signal]] = {own.number: own for own in KINDS.values() if own is not None}


def needs_head(kind: str) -> bool:
    """Return whether signals of this kind mean nothing without the teacher's head."""
    own = KINDS[kind]
    return own is not None and own.needs_head


def check_record(record: Record, rules: Rules, *, packed: bool = False) -> None:
    """Raise CacheError, naming row, field and position, if the row violates an invariant of the format.

    `packed`: the signal was packed, which rounds; its columns may then differ from it by that much.
    """
    check_columns(record, rules)
    expected = KINDS[rules.kind]
    if not isinstance(record.signal, expected or type(None)):
        found = "none" if record.signal is None else type(record.signal).__name__.lower()
        refuse(record, f"signal is {found}; expected {rules.kind}, as the fingerprint says")
    if record.signal is not None:
        record.signal.check(record, rules, packed=packed)
