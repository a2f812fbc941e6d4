"""The fingerprint of a cache: fields that must match, and fields that are only recorded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from cache.commit import FINGERPRINT, TOKENIZER, canonical_json, is_count, is_digest, seal, unseal
from cache.plain import plain
from cache.schema import FORMAT_VERSION, CacheError, Rules
from cache.signals import KINDS
from cache.store import LocalStore, Store

_SHOWN = 48
_MOST_NAMED = 8
_MOST_IDS = 2**31  # int32
_DEPTH = 32
_MOST_VALUES = 100_000
_ABSENT = "absent"
_ADVICE = "Delete it and rerun stage one, which writes a new one; committed rows are kept."


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a cache's content; values are any JSON values.

    Attributes:
        must_match: teacher, teacher_dtype, tokenizer, chat_template, chat_template_kwargs, vocab_size, signal
            {kind, k, p, temperature}; format_version is added here.
        recorded: student, sampling, dataset: informational, may differ between writers.
        tokenizer_sha256: digest of the first writer's tokenizer.json; None without one and before it is
            stored.
    """

    must_match: dict[str, Any]
    recorded: dict[str, Any] = field(default_factory=dict)
    tokenizer_sha256: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        must_match = {**_plain("must_match", self.must_match), "format_version": FORMAT_VERSION}
        object.__setattr__(self, "must_match", must_match)
        object.__setattr__(self, "recorded", _plain("recorded", self.recorded))
        signal, vocab_size = must_match.get("signal"), must_match.get("vocab_size")
        if not isinstance(signal, dict) or signal.get("kind") not in list(KINDS):
            raise CacheError(
                f"the fingerprint's signal is {signal!r}; expected a kind among {', '.join(KINDS)}."
            )
        if not is_count(vocab_size, 1, _MOST_IDS):
            raise CacheError(
                f"the fingerprint's vocab_size is {vocab_size!r}; expected a number of ids >= 1."
            )
        k, temperature = signal.get("k"), signal.get("temperature", 1.0)
        if k is not None and not is_count(k, 1, _MOST_IDS):
            raise CacheError(f"the fingerprint's signal keeps k = {k!r} ids; expected a number of ids >= 1.")
        if type(temperature) not in (int, float) or not 0 < temperature < _MOST_IDS:
            raise CacheError(
                f"the fingerprint's signal is at temperature {temperature!r}; expected a number above 0."
            )

    @property
    def digest(self) -> str:
        """sha256 of the part that must match."""
        return hashlib.sha256(canonical_json(self.must_match)).hexdigest()

    @property
    def rules(self) -> Rules:
        """Return the rules for every row."""
        signal = self.must_match["signal"]
        temperature = float(signal.get("temperature", 1.0))
        return Rules(self.must_match["vocab_size"], signal["kind"], temperature, signal.get("k"))

    def compare(self, wanted: Fingerprint, root: str | PathLike[str]) -> list[str]:
        """Compare this fingerprint, of the cache at `root`, with the one a program expects.

        Returns one sentence per recorded field that differs. CacheError if a field that must match differs.
        """
        for name, own, other in _differences(self.must_match, wanted.must_match):
            own, other = _show(own, other)
            raise CacheError(
                f"{root}: the cache's {name} is {own}, expected {other}. Rows of both cannot share a"
                f" cache: use another cache directory, or set {name} as it was when the cache was written."
                " Nothing was changed."
            )
        return [
            f"{plain(name)} is {_show(other, own)[0]}, the cache was started with {_show(own, other)[0]}"
            for name, own, other in _differences(self.recorded, wanted.recorded)
        ]


def load_fingerprint(store: Store) -> Fingerprint | None:
    """Return the cache's fingerprint, None if it has none; CacheError if it is damaged."""
    path = store.path(FINGERPRINT)
    data = store.read_or_none(FINGERPRINT)
    if data is None:
        return None
    _check_values(path, data)
    body = unseal(path, data, _ADVICE)
    must_match, recorded = body.get("must_match"), body.get("recorded")
    if not (isinstance(must_match, dict) and isinstance(recorded, dict) and "tokenizer_sha256" in body):
        raise CacheError(f"{path} is not a fingerprint. {_ADVICE}")
    if body["tokenizer_sha256"] is not None and not is_digest(body["tokenizer_sha256"]):
        raise CacheError(f"{path}: its tokenizer_sha256 is not a sha256. {_ADVICE}")
    version = must_match.get("format_version")
    if version != FORMAT_VERSION:
        raise CacheError(
            f"{store.root} has format version {version}, this program reads version {FORMAT_VERSION}; read"
            " the cache with the program that wrote it, or use another cache directory."
        )
    return Fingerprint(must_match, recorded, body["tokenizer_sha256"])


def no_cache(store: Store) -> CacheError:
    """The error for a root without a cache, which names the caches near a local one."""
    near = _caches_near(Path(store.root)) if isinstance(store, LocalStore) else []
    there = f"there {'is' if len(near) == 1 else 'are'} {', '.join(near[:_MOST_NAMED])}" if near else ""
    return CacheError(
        f"{store.root} holds no cache (no fingerprint.json); {there or 'give the directory that stage one wrote'}."
    )


def _caches_near(root: Path) -> list[str]:
    """Caches in `root` and in the runs beside it; if it does not exist, in the nearest folder that does."""
    folder = root if root.is_dir() else next((each for each in root.parents if each.is_dir()), root)
    found = {path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{FINGERPRINT}")}
    return sorted(str(each) for each in found)


def tokenizer_problem(store: Store, fingerprint: Fingerprint) -> str | None:
    """Return how tokenizer.json differs from the one that the cache was created with, and the remedy."""
    expected, actual = fingerprint.tokenizer_sha256, None
    if expected is not None and store.size(TOKENIZER) is not None:
        actual = store.hash(TOKENIZER)
    if expected == actual:
        return None
    found = (
        f": sha256 is {actual[:8]}…, fingerprint.json says {str(expected)[:8]}…" if actual else " is missing"
    )
    remedy = "Restore the tokenizer's own tokenizer.json; the rows do not depend on it."
    return f"{store.path(TOKENIZER)}{found}. {remedy}"


def store_fingerprint(
    store: Store, wanted: Fingerprint, tokenizer_json: str | None, committed_as: str | None
) -> Fingerprint:
    """Return the cache's fingerprint; if it has none, store `wanted` and the tokenizer.

    `committed_as` is the digest in the cache's commit records, or None without records: a cache that lost its
    fingerprint only accepts it back from a writer of the same rows.
    """
    stored = load_fingerprint(store)
    if stored is None:
        if committed_as not in (None, wanted.digest):
            raise CacheError(
                f"{store.root}: fingerprint.json is missing, and the committed rows were written under"
                f" another fingerprint ({str(committed_as)[:8]}…, this program's is {wanted.digest[:8]}…)."
                " Use another cache directory, or rerun with the settings that wrote it."
            )
        if tokenizer_json is not None:
            store.create(TOKENIZER, tokenizer_json.encode())
        kept = None if store.size(TOKENIZER) is None else store.hash(TOKENIZER)
        body = {"must_match": wanted.must_match, "recorded": wanted.recorded, "tokenizer_sha256": kept}
        store.create(FINGERPRINT, seal(body))
        stored = load_fingerprint(store)
        assert stored is not None
    return stored


def _plain(name: str, value: dict[str, Any]) -> dict[str, Any]:
    try:
        data = canonical_json(value)
        copied: dict[str, Any] = json.loads(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise CacheError(f"the fingerprint's {name} cannot be written as JSON ({error}).") from error
    _check_values(f"the fingerprint's {name}", data)
    if _is_deeper(copied, _DEPTH):
        raise CacheError(f"the fingerprint's {name} is nested more than {_DEPTH} deep.")
    return copied


def _check_values(what: str, data: bytes) -> None:
    """Raise CacheError for a JSON text with too many values: decoded, each takes up to 30 times its bytes."""
    if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise CacheError(
            f"{what} holds more than {_MOST_VALUES:,} values, more than any fingerprint of this program."
        )


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return depth == 0 or any(
        _is_deeper(v, depth - 1) for v in (value.values() if isinstance(value, dict) else value)
    )


def _differences(own: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for name in sorted(own.keys() | other.keys()):
        left, right = own.get(name, _ABSENT), other.get(name, _ABSENT)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found.append((prefix + name, left, right))
    return found


def _show(value: Any, other: Any) -> tuple[str, str]:
    """Return both values as text; long ones start just before their first difference."""
    texts = [v if v is _ABSENT else plain(json.dumps(v, ensure_ascii=False)) for v in (value, other)]
    if max(map(len, texts)) <= _SHOWN:
        return texts[0], texts[1]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, same - _SHOWN // 2)
    shown = [
        ("…" if start else "") + t[start : start + _SHOWN] + ("…" if len(t) > start + _SHOWN else "")
        for t in texts
    ]
    return shown[0], shown[1]
