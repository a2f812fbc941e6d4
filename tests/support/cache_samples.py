"""Small seeded rows of every signal, for the cache tests."""

import hashlib
from pathlib import Path

import numpy as np

import cache

VOCAB, WIDTH, KEPT = 503, 7, 5
KINDS = ("none", "topk", "nucleus", "hidden", "full")


def fingerprint(kind: str = "topk", **changes: object) -> cache.Fingerprint:
    signal = {"kind": kind, "temperature": 1.0}
    if kind in ("topk", "nucleus"):
        signal["k"] = KEPT
    if kind == "nucleus":
        signal["p"] = 0.9
    must_match = {
        "teacher": "a-teacher@1f2e",
        "teacher_dtype": "bfloat16",
        "tokenizer": "ab12",
        "chat_template": "{{ turns }}",
        "chat_template_kwargs": {"enable_thinking": False},
        "vocab_size": VOCAB,
        "signal": signal,
    }
    return cache.Fingerprint({**must_match, **changes}, {"student": "a-student", "dataset": "problems.jsonl"})


def row_id(number: int) -> str:
    return hashlib.sha256(f"row {number}".encode()).hexdigest()[:32]


def head(seed: int = 0) -> cache.TeacherHead:
    rng = np.random.default_rng(seed)
    bias = rng.normal(size=VOCAB).astype(np.float32)
    return cache.TeacherHead(
        bfloat16(rng.normal(size=(VOCAB, WIDTH))), "bfloat16", bias, scale=0.5, softcap=30.0
    )


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Truncate to bfloat16, as bit patterns."""
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def record(number: int, kind: str = "topk", num_tokens: int | None = None, **changes: object) -> cache.Record:
    """Row `number`, deterministic in its arguments; `changes` replace fields."""
    rng = np.random.default_rng(number)
    T = num_tokens or 1 + number % 6
    logprobs = log_softmax(rng.normal(0, 3, (T, VOCAB)))
    completion = rng.integers(0, VOCAB, T)
    fields: dict[str, object] = {
        "row_id": row_id(number),
        "prompt_id": f"p{number // 2}",
        "occurrence": 0,
        "sample_index": number % 2,
        "refresh_index": number // 4,
        "run_id": "demo",
        "policy_step": 10 * (number // 4),
        "policy_hash": f"{number // 4:016x}",
        "finish_reason": "length" if number % 3 == 0 else "eos",
        "prompt_text": f"How much is {number} + 1?",
        "completion_text": f"It is\n{number + 1}.",
        "prompt_ids": rng.integers(0, VOCAB, 1 + number % 4),
        "completion_ids": completion,
        "behaviour_logprobs": -rng.random(T),
        "behaviour_entropy": rng.random(T),
    }
    if kind != "none":
        kept = topk(logprobs, ragged=kind == "nucleus")
        tail = kept.log_tail_mass if kind in ("topk", "nucleus") else np.full(T, -np.inf)
        fields |= {
            "teacher_logprobs": logprobs[np.arange(T), completion],
            "top1_id": kept.ids[:, 0],
            "teacher_entropy": -(np.exp(logprobs) * logprobs).sum(1),
            "top1_logprob": kept.logprobs[:, 0],
            "log_tail_mass": tail,
            "signal": signal_of(kind, kept, logprobs, rng),
        }
    return cache.Record(**{**fields, **changes})


def topk(logprobs: np.ndarray, ragged: bool = False) -> cache.TopK:
    order = np.argsort(-logprobs, axis=1)
    kept = np.take_along_axis(logprobs, order[:, :KEPT], 1)
    count = 1 + np.arange(len(kept)) % KEPT if ragged else np.full(len(kept), KEPT)
    empty = np.arange(KEPT) >= count[:, None]
    ids = np.where(empty, -1, order[:, :KEPT])
    kept = np.where(empty, -np.inf, kept)
    return cache.TopK(ids, kept, np.log1p(-np.exp(kept).sum(1)))


def signal_of(kind: str, kept: cache.TopK, logprobs: np.ndarray, rng: np.random.Generator) -> object:
    if kind in ("topk", "nucleus"):
        return kept
    if kind == "hidden":
        return cache.Hidden(bfloat16(rng.normal(size=(len(logprobs), WIDTH))), "bfloat16")
    return cache.Full(logprobs.astype(np.float16), "float16")


def write(root: Path, numbers: range, kind: str = "topk", unit: str = "g0000-00000") -> cache.CommitResult:
    """Commit some rows as one unit."""
    with cache.Writer(root, fingerprint(kind), head=head() if kind == "hidden" else None) as writer:
        for number in numbers:
            writer.append(record(number, kind))
        return writer.commit(unit)


def assert_same(actual: cache.Record, expected: cache.Record) -> None:
    """Assert equality in every field; a top-k signal's logprobs and tail up to codec rounding."""
    for name, value in vars(expected).items():
        if name != "signal":
            np.testing.assert_array_equal(getattr(actual, name), value, err_msg=name)
    assert type(actual.signal) is type(expected.signal)
    exact = not isinstance(expected.signal, cache.TopK)
    for name, value in vars(expected.signal).items() if expected.signal else ():
        own = getattr(actual.signal, name)
        if exact or name == "ids":
            np.testing.assert_array_equal(own, value, err_msg=name)
        else:
            np.testing.assert_allclose(own, value, atol=1 / 256 if name == "logprobs" else 1e-4, err_msg=name)


def files(folder: Path) -> list[str]:
    """Names of all files in a folder, including temporary ones."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
