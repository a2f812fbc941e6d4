"""A made-up run in the shape that the viewer's page reads: any number of rollouts of any length."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from stages.viewer.columns import LAWS, deflated, id_columns, number_columns
from stages.viewer.rollouts import REFERS

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
CONTROLS = "\x1b[31mred\u202egnp.exe\u2066\x07"
TEXT = (
    "the a of to and is that we have so then first next total cost price apples each per week twice half "
    "minus plus equals 12 3 48 96 7 dollars hours therefore answer left sold remaining number from with for groups"
)
WORDS = TEXT.split()
PROMPTS = (
    "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?",
    "A shop has 96 apples and sells 12 of them each day. How many are left after 3 days?",
    "Weng earns 12 dollars an hour for babysitting. Yesterday she did 50 minutes. How much did she earn?",
    "Write a function that returns the n-th Fibonacci number, and explain its cost.",
)


def vocabulary() -> list[dict[str, Any]]:
    """Words, line breaks, special tokens, bytes that are no text, and texts that a page must not run."""
    found: list[dict[str, Any]] = [
        {"s": "<|im_end|>"},
        {"t": "\n"},
        {"t": "\n\n"},
        {"b": "e2 82"},
        {"t": ","},
        {"t": "."},
    ]
    found += [{"t": HOSTILE}, {"t": CONTROLS}, {"t": "\t"}, {"s": "<|im_start|>"}]
    return found + [{"t": " " + word} for word in WORDS] + [{"t": f" w{number}"} for number in range(2000)]


def tokens_of(generator: np.random.Generator, count: int, stops: bool, hostile: bool) -> np.ndarray:
    ids = generator.choice(np.arange(10, 10 + len(WORDS)), count)
    ids[generator.random(count) < 0.04] = 4
    ids[generator.random(count) < 0.04] = 5
    ids[generator.random(count) < 0.02] = 1
    rare = generator.random(count) < 0.1
    ids[rare] = generator.integers(60, 2000, int(rare.sum()))
    if hostile:
        ids[[2, 4, 6, 8]] = [6, 7, 3, 8]
    if stops:
        ids[-1] = 0
    return ids


def rollouts(rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Rows of about `length` tokens; the first is hostile, every third is cut, every other was traced."""
    generator = np.random.default_rng(seed)
    lengths = [length if row % 3 == 0 else int(length * generator.uniform(0.4, 1)) for row in range(rows)]
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    parts = [tokens_of(generator, n, row % 3 != 0, row == 0) for row, n in enumerate(lengths)]
    ids = np.concatenate(parts).astype(np.uint16)
    total = len(ids)
    rkl = np.minimum(generator.gamma(0.25, 0.8, total), 9.0)
    fkl = np.minimum(rkl * generator.uniform(0.3, 0.9, total), 9.0)
    gate = 1 / (1 + np.exp(-5 * (1.0 - rkl)))
    untraced = np.concatenate([np.full(n, row % 2 == 1) for row, n in enumerate(lengths)])
    gap = generator.normal(0, 0.4, total) - 0.4 * rkl
    entropy = generator.gamma(1.0, 0.6, total)
    top = generator.integers(10, 60, (total, 5)).astype(np.uint16)
    top[:, 0] = np.where(generator.random(total) < 0.8, ids, top[:, 0])
    mass = np.sort(generator.dirichlet([4, 1, 0.5, 0.3, 0.2, 0.3], total)[:, :5])[:, ::-1]
    student_top = np.roll(top, 1, axis=1)
    student_top[:, 0] = ids
    logprob = np.log(np.maximum(mass, 1e-6))
    values = {
        "teacher_logprob": np.minimum(logprob[:, 0] + gap, 0),
        "behaviour_logprob": logprob[:, 0],
        "rkl": rkl,
        "fkl": fkl,
        "lambda": gate,
        "teacher_entropy": entropy,
        "student_entropy": entropy * generator.uniform(0.8, 1.2, total),
        "tail": generator.beta(1, 60, total),
        "teacher_top_logprob": logprob,
        "student_top_logprob": logprob * 1.1,
    }
    for name in ("rkl", "fkl", "lambda", "student_entropy", "student_top_logprob"):
        values[name] = np.where(untraced.reshape(-1, *[1] * (values[name].ndim - 1)), np.nan, values[name])
    places = {"token": ids, "teacher_top": top, "student_top": student_top}
    columns = id_columns({n: p.astype(np.int64) for n, p in places.items()}, REFERS) | number_columns(
        values, LAWS
    )
    found = []
    for row, (start, n) in enumerate(zip(offsets, lengths)):
        here = slice(int(start), int(start) + n)
        traced = not untraced[start]
        found.append(
            {
                "id": f"g{row // 40:04d}-{row:05d}",
                "prompt_id": f"train-{row % 17}",
                "step": (row // 40) * 8,
                "refresh": row // 40,
                "finish": "length" if row % 3 == 0 else "stop",
                "tokens": n,
                "solved": None if row % 5 == 4 else bool(row % 5 in (1, 2)),
                "rkl": float(rkl[here].mean()) if traced else None,
                "fkl": float(fkl[here].mean()) if traced else None,
                "lambda": float(gate[here].mean()) if traced else None,
                "gap": float(gap[here].mean()),
                "entropy": float(entropy[here].mean()),
                "prompt": 0 if row == 0 else 1 + row % len(PROMPTS),
                "traced_at": 8 if traced else None,
                "offset": int(start),
                "source": "cache",
            }
        )
    how = (
        f"{rows} of {20 * rows} rollouts: the worst by reverse KL, the longest, cut ones, the rest at random."
    )
    prompts = [
        {"text": None, "messages": [{"role": "user", "content": text}]}
        for text in (f"{PROMPTS[0]}\n{HOSTILE}", *PROMPTS)
    ]
    packed = {"rows": found, "prompts": prompts, "vocabulary": vocabulary()}
    return {
        "shown": rows,
        "total": 20 * rows,
        "heldout": 0,
        "how": how,
        "tokens": total,
        "packed": deflated(json.dumps(packed).encode()),
        "columns": columns,
    }


def steps(count: int, seed: int = 0) -> dict[str, list[Any]]:
    """Columns of the step records of a run that improves."""
    generator = np.random.default_rng(seed)
    at = np.arange(1, count + 1)
    rkl = 0.5 * np.exp(-at / (count / 3)) + 0.05 + generator.normal(0, 0.012, count)
    columns: dict[str, list[Any]] = {
        "step": at.tolist(),
        "rkl": rkl.tolist(),
        "fkl": (0.35 * rkl + generator.normal(0, 0.004, count)).tolist(),
        "loss": (0.9 * rkl + generator.normal(0, 0.01, count)).tolist(),
        "gate": (0.95 - 0.17 * rkl / 0.5 + generator.normal(0, 0.004, count)).tolist(),
        "share_forward": (0.2 * rkl).tolist(),
        "teacher_entropy": (0.6 + 0.1 * np.sin(at / 9)).tolist(),
        "mean_completion_tokens": (90 + 6 * np.sin(at / 13) + generator.normal(0, 2, count)).tolist(),
        "drift": np.abs(0.02 * ((at % 8) / 8) + generator.normal(0, 0.002, count)).tolist(),
        "lr": (2e-5 * np.minimum(at / 8, 1) * (0.5 + 0.5 * np.cos(np.pi * at / count))).tolist(),
        "tokens_per_second": (3100 + generator.normal(0, 120, count)).tolist(),
        "grad_norm": (0.8 * rkl + generator.normal(0, 0.02, count)).tolist(),
    }
    columns["drift"][0] = None
    return columns


CURVES = [
    ("Loss", "nats/token", True, [("loss", "loss")]),
    ("Divergence from the teacher", "nats/token", True, [("rkl", "reverse KL"), ("fkl", "forward KL")]),
    ("Gate", "", False, [("gate", "mean λ"), ("share_forward", "share with λ < 0.5")]),
    ("Teacher entropy", "nats", False, [("teacher_entropy", "entropy")]),
    ("Completion length", "tokens", False, [("mean_completion_tokens", "mean")]),
    ("Drift from the rows' policy", "nats/token", False, [("drift", "drift")]),
    ("Gradient norm", "", False, [("grad_norm", "before clipping")]),
    ("Learning rate", "", False, [("lr", "learning rate")]),
    ("Throughput", "tokens/s", False, [("tokens_per_second", "trained tokens")]),
]


def interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def run(
    name: str = "demo", rows: int = 24, length: int = 96, num_steps: int = 96, seed: int = 0
) -> dict[str, Any]:
    edges = [10 ** (-6 + i / 2) for i in range(17)]
    shape = np.exp(-((np.arange(16) - 7.0) ** 2) / 14)
    gate_steps = list(range(4, num_steps + 1, 4))
    over_time = [[400] * 4 + [50 + i] * 15 + [9000 + 10 * i] for i in range(len(gate_steps))]
    shares = [i / 20 for i in range(21)]
    positions = ["0-15", "16-31", "32-63", "64-127", "128-255", "256+"]
    ages = ["0-3", "4-7", "8-15"]
    by = lambda names: {  # noqa: E731
        one: {
            "tokens": 9000 - 1200 * i,
            "share": 0.3 - 0.04 * i,
            "gate": 0.82 + 0.03 * i,
            "share_forward": 0.16 - 0.02 * i,
            "rkl": 0.4 - 0.05 * i,
            "fkl": 0.15 - 0.02 * i,
        }
        for i, one in enumerate(names)
    }
    answers = [
        {
            "prompt_id": f"heldout-{i}" if i else "train-0",
            "messages": [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}],
            "before": {
                "text": "48 / 2 = 26\n48 + 26 = 74\nThe answer is 74.",
                "solved": i % 4 == 3,
                "finish": "stop",
            },
            "after": {
                "text": "48 / 2 = 24\n48 + 24 = 72\nThe answer is 72.",
                "solved": i % 4 != 2,
                "finish": "stop",
            },
            "teacher": {
                "text": "In May: 48 / 2 = 24\nAltogether: 48 + 24 = 72\nThe answer is 72.",
                "solved": True,
                "finish": "stop",
            },
        }
        for i in range(16)
    ]
    return {
        "name": name,
        "kind": "run",
        "about": f"SmolLM2-135M pruned ← SmolLM2-135M-Instruct · {num_steps} steps",
        "headline": "Solves 89.0% of held-out problems, up from 39.0%",
        "verdict": "The student improved by 50.0 points, from 39.0% to 89.0% of held-out problems; on its own"
        " text forward KL fell to 0.08 × and reverse KL to 0.11 × of what they were.",
        "table": [
            {
                "label": "held-out problems solved",
                "unit": "%",
                "before": interval(0.39, 0.067),
                "after": interval(0.89, 0.043),
                "teacher": interval(0.955, 0.029),
            },
            {
                "label": "held-out answers cut at max_new_tokens",
                "unit": "%",
                "before": interval(0, 0),
                "after": interval(0, 0),
                "teacher": interval(0, 0),
            },
            {
                "label": "forward KL on its own text",
                "unit": "nats",
                "before": interval(0.1731, 0.021),
                "after": interval(0.0146, 0.002),
                "teacher": None,
            },
            {
                "label": "reverse KL on its own text",
                "unit": "nats",
                "before": interval(0.5208, 0.06),
                "after": interval(0.0549, 0.008),
                "teacher": None,
            },
            {
                "label": "same most likely token, its own text",
                "unit": "%",
                "before": interval(0.957, 0.006),
                "after": {"value": 0.995, "low": None, "high": None},
                "teacher": None,
            },
        ],
        "curves": [
            {"title": t, "unit": u, "log": log, "x": "step", "series": [{"key": k, "label": v} for k, v in s]}
            for t, u, log, s in CURVES
        ],
        "steps": steps(num_steps, seed),
        "marks": [{"step": 0, "kind": "start", "text": "training starts"}]
        + [
            {"step": s, "kind": "refresh", "text": f"refresh {s // 24}: every 24 steps"}
            for s in range(24, num_steps, 24)
        ]
        + [{"step": 41, "kind": "warning", "text": "the gradient norm is above 10 times its median"}],
        "evals": {"step": [24, 48, 72], "forward_kl": [0.08, 0.04, 0.02], "reverse_kl": [0.25, 0.12, 0.07]},
        "gate": {
            "lambda_vs_d": {
                "edges": edges,
                "counts": (90000 * shape).astype(int).tolist(),
                "tau": 1.0,
                "alpha": 5.0,
                "gating": "soft",
                "gate_on": "rkl",
            },
            "histogram_over_time": {"steps": gate_steps, "edges": shares, "counts": over_time},
            "by_position": by(positions),
            "by_age": by(ages),
        },
        "seconds": [
            {"phase": "rollouts", "seconds": 41.2, "kind": "generate"},
            {"phase": "teacher scores", "seconds": 18.9, "kind": "score"},
            {"phase": "training", "seconds": 62.0, "kind": "train"},
            {"phase": "evaluation", "seconds": 33.1, "kind": "evaluate"},
            {"phase": "other", "seconds": 4.4, "kind": "other"},
        ],
        "notes": ["step-8.arrow cannot be read (its digest differs): the page leaves it out"],
        "stage_one": {"rounds": 4, "generated_tokens_per_second": 1650.0},
        "memory": {"training": 31 * 2**30},
        "cache": {
            "rows": 3072,
            "tokens": 89474,
            "bytes": 7881278,
            "scored_tokens": 89474,
            "bytes_per_token": 88.1,
            "signal_bytes_per_token": 61.3,
            "cut_share": 0.0,
        },
        "provenance": [
            {"label": "command", "value": "dualkl run demo --seed 0"},
            {"label": "commit", "value": "f01731e"},
            {"label": "versions", "value": "torch 2.13.0, transformers 5.17.0, peft 0.21.0"},
            {"label": "hardware", "value": "2 × CPU cores, 23 GiB"},
            {"label": "student hash", "value": "9f47895f711af1a37807"},
        ],
        "config": {
            "loss": {"tau": 1.0, "alpha": 5.0, "gating": "soft"},
            "train": {"lr": 2e-5 if not seed else 5e-5, "steps": num_steps, "seed": seed},
        },
        "config_changes": [{"from_step": 48, "key": "lr", "old": 4e-5, "new": 2e-5}],
        "warnings": [{"step": 41, "text": "the gradient norm is above 10 times its median"}],
        "rollouts": rollouts(rows, length, seed),
        "answers": answers,
    }


def document(*runs: dict[str, Any]) -> dict[str, Any]:
    """The whole of the page's data."""
    return {
        "format": 1,
        "made": {"time": "2026-11-28T12:00:00Z", "version": "0.2.0"},
        "serve": False,
        "runs": list(runs),
    }
