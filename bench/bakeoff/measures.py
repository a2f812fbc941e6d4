"""Measurements of a student on held-out prompts: on teacher text, on its own fresh text, and outside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualkl import DualKLConfig, HiddenTeacher, dual_kl
from dualkl.divergences import compare, gather_logprobs
from stages.data.alignment import Aligned, align, at_scored
from stages.data.batches import micro_batches
from stages.data.checkers import open_checker, solved
from stages.data.prompts import Prompt
from stages.models.dropout import evaluating
from stages.models.policy import Policy
from stages.models.student import Student
from stages.models.teacher import Teacher

ENTROPY_BOUNDS = (0.01, 0.1, 0.5, 1.0, 2.0)
"""Nats; bins of the teacher's entropy."""
OUTSIDE = Path(__file__).with_name("outside.jsonl")
GRAM = 4
Result = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """A completion of a held-out prompt."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    was_cut: bool


def write_texts(policy: Policy, prompts: list[Prompt], num_slots: int, num_samples: int = 1) -> list[Text]:
    """`num_samples` completions of each prompt, in order; random numbers depend on their place alone."""
    asked = [prompt.ids for prompt in prompts for _ in range(num_samples)]
    written = policy.generate(asked, list(range(1, len(asked) + 1)), num_slots)
    return [
        Text(ids, done.ids, done.finish_reason == "length") for ids, done in zip(asked, written, strict=True)
    ]


def forwards(
    student: Student, teacher: Teacher | None, texts: list[Text], max_tokens: int
) -> Iterator[Aligned]:
    packed = student.packs and (teacher is None or teacher.packs)
    size = lambda text: len(text.prompt_ids) + len(text.completion_ids)  # noqa: E731
    for part in micro_batches(texts, size, None, max_tokens, packed=packed):
        yield align(
            [text.prompt_ids for text in part],
            [text.completion_ids for text in part],
            student.tokenizer.pad_token_id,
            student.device,
            packed=packed,
        )


@torch.no_grad()
def divergences(student: Student, teacher: Teacher, texts: list[Text], max_tokens: int) -> Result:
    """Token means over the texts, exact over the vocabulary, nats.

    `by_entropy`: the same in bins of the teacher's entropy.
    """
    columns: list[Tensor] = []
    jensen_shannon = 0.0
    settings = DualKLConfig(objective="jsd", gating="fixed", mix=0.5, vocab_size=student.vocab_size)
    with evaluating(student.model):
        for aligned in forwards(student, teacher, texts, max_tokens):
            own_Nd = at_scored(student.hidden(aligned), aligned)
            their_ND = at_scored(teacher.hidden(aligned), aligned)
            target = HiddenTeacher(their_ND, teacher.head)
            found = compare(own_Nd, student.head, target, vocab_size=student.vocab_size)
            turned = compare(
                their_ND, teacher.head, HiddenTeacher(own_Nd, student.head), vocab_size=student.vocab_size
            )
            agree = found.student_top1 == found.teacher_top1
            parts = (found.fkl, found.rkl, agree, found.student_entropy, turned.student_entropy)
            columns.append(torch.stack([part.double().cpu() for part in parts]))
            weights_N = torch.ones(len(own_Nd), device=own_Nd.device)
            jensen_shannon += float(dual_kl(own_Nd, student.head, target, settings, None, weights_N).loss)
    names = ("forward_kl", "reverse_kl", "top1_agreement", "student_entropy", "teacher_entropy")
    values_5N = torch.cat(columns, 1).numpy()
    means = dict(zip(names, values_5N.mean(1).tolist(), strict=True))
    bins_N = np.digitize(values_5N[4], ENTROPY_BOUNDS)
    by_entropy = []
    for number in range(len(ENTROPY_BOUNDS) + 1):
        inside_5M = values_5N[:, bins_N == number]
        if inside_5M.shape[1]:
            means_of_bin = dict(zip(names, inside_5M.mean(1).tolist(), strict=True))
            by_entropy.append({"bin": number, "tokens": inside_5M.shape[1], **means_of_bin})
    tokens = values_5N.shape[1]
    return {**means, "jsd": jensen_shannon / tokens, "tokens": tokens, "by_entropy": by_entropy}


def style(texts: list[Text]) -> Result:
    """Completion length in tokens, share cut, and the mean share of distinct 4-grams in a completion."""
    distinct = []
    for text in texts:
        grams = list(zip(*(text.completion_ids[start:].tolist() for start in range(GRAM)), strict=False))
        if grams:
            distinct.append(len(set(grams)) / len(grams))
    return {
        "completion_tokens": float(np.mean([len(text.completion_ids) for text in texts])),
        "cut_share": float(np.mean([text.was_cut for text in texts])),
        "distinct_4grams": float(np.mean(distinct)) if distinct else None,
    }


def solved_counts(policy: Policy, prompts: list[Prompt], spec: str, samples: int, num_slots: int) -> Result:
    """avg@k, and of each problem the number of its `samples` completions that are right."""
    checker = open_checker(spec)
    assert checker is not None
    texts = write_texts(policy, prompts, num_slots, samples)
    right = [
        bool(solved(checker, spec, prompts[place // samples], _decoded(policy, text), place // samples + 1))
        for place, text in enumerate(texts)
    ]
    counts = np.array(right).reshape(len(prompts), samples).sum(1)
    return {
        "avg": float(counts.mean() / samples),
        "solved": counts.tolist(),
        "samples": samples,
        **style(texts),
    }


def _decoded(policy: Policy, text: Text) -> str:
    return str(policy.tokenizer.decode(text.completion_ids, skip_special_tokens=True))


@torch.no_grad()
def outside_nll(student: Student, max_tokens: int) -> float:
    """Nats a token on text of another kind than the task's (outside.jsonl)."""
    rows = [json.loads(line)["text"] for line in OUTSIDE.read_text().splitlines()]
    ids = [np.array(student.tokenizer(row, add_special_tokens=False)["input_ids"]) for row in rows]
    texts = [Text(row[:1], row[1:], False) for row in ids]
    total, tokens = 0.0, 0
    with evaluating(student.model):
        for aligned in forwards(student, None, texts, max_tokens):
            hidden_Nd = at_scored(student.hidden(aligned), aligned)
            found_N = gather_logprobs(hidden_Nd, student.head, aligned.targets, vocab_size=student.vocab_size)
            total, tokens = total - float(found_N.double().sum()), tokens + len(found_N)
    return total / tokens


def pass_at(solved_P: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Unbiased pass@k of each problem (arXiv 2107.03374): 1 - C(n - c, k) / C(n, k)."""
    failed_P = np.ones(len(solved_P))
    for missing in range(k):
        failed_P *= np.clip(samples - solved_P - missing, 0, None) / (samples - missing)
    return 1 - failed_P
