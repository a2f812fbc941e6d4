"""Scoring: the cut into forwards, the columns against dense logits, and equal forwards on all ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cache
from dualkl import Head
from stages.data.signals import KINDS
from stages.loops.budgets import CPU_SCORE_TOKENS
from stages.loops.scoring import kept_of, packed_batches, scoring_batches, teacher_columns
from stages.loops.writing import to_numpy
from stages.runtime.config import RolloutSection, SignalSection
from tests.support import reference
from tests.support.helpers import make_run
from tests.support.tiny_runs import TINY, student_of, write_rollouts
from tests.support.training_rows import make_record

# Batches


@pytest.mark.parametrize(("rows", "tokens"), [(4, 16_384), (None, 40), (3, 40), (1, 1), (None, 16_384)])
def test_batches_cover_every_row_once_within_their_caps(rows: int | None, tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(4, 30, 50).tolist()
    batches = scoring_batches(lengths, rows, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    for batch in batches:
        assert rows is None or len(batch) <= rows
        assert len(batch) * max(lengths[i] for i in batch) <= tokens or len(batch) == 1
        assert lengths[batch[0]] == max(lengths[i] for i in batch)


def test_batches_put_like_lengths_together() -> None:
    assert [sorted(batch) for batch in scoring_batches([10, 30, 10, 30, 10, 30], 3, 16_384)] == [
        [1, 3, 5],
        [0, 2, 4],
    ]


def test_rows_of_one_length_fill_every_forward_but_the_last() -> None:
    assert sorted(len(batch) for batch in scoring_batches([100] * 10, None, 400)) == [2, 4, 4]


def test_no_rows_need_no_forward() -> None:
    assert scoring_batches([], None, 400) == []


SPREADS = {
    "uniform": lambda dice, n: dice.integers(16, 513, n),
    "lognormal": lambda dice, n: np.clip(dice.lognormal(5, 0.8, n), 16, 512),
    "prompt and geometric completion": lambda dice, n: (
        dice.integers(20, 200, n) + np.minimum(512, dice.geometric(1 / 250, n))
    ),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("seed", range(3))
def test_padding_of_a_default_unit_is_below_five_percent_in_few_forwards(spread: str, seed: int) -> None:
    num_rows = RolloutSection().rollouts_per_unit
    lengths = [int(n) for n in SPREADS[spread](np.random.default_rng(seed), num_rows)]
    batches = scoring_batches(lengths, None, CPU_SCORE_TOKENS)
    padded = sum(len(batch) * lengths[batch[0]] for batch in batches)
    assert 1 - sum(lengths) / padded < 0.05
    assert len(batches) <= 2 * -(-sum(lengths) // CPU_SCORE_TOKENS)
    filled = sorted(len(batch) * lengths[batch[0]] for batch in batches)
    assert filled[len(filled) // 2] > 0.5 * CPU_SCORE_TOKENS


# Columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "signal",
    [
        SignalSection(signal="topk", signal_k=5),
        SignalSection(signal="nucleus", signal_k=9, signal_p=0.7),
        SignalSection(signal="topk", signal_k=1000),
        SignalSection(signal="hidden"),
        SignalSection(signal="full"),
    ],
    ids=lambda signal: f"{signal.signal}-{signal.signal_k}",
)
def test_columns_agree_with_the_loops_over_dense_logits(signal: SignalSection, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=random).to(dtype)
    head = {"weight": (torch.randn(47, 16, generator=random) * 0.8).to(dtype), "scale": 0.9, "softcap": 8.0}
    targets = torch.randint(0, 41, (7,), generator=random)
    kept = kept_of(hidden, Head(**head), targets, signal, 41)
    tensors = teacher_columns(KINDS[signal.signal], hidden, Head(**head), kept, 41)
    columns = {name: to_numpy(tensor) for name, tensor in tensors.items()}
    logits = reference.head_logits(hidden, head, 41)
    logprobs = logits.log_softmax(-1)
    close: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
    np.testing.assert_allclose(
        columns["teacher_logprobs"], logprobs.gather(1, targets[:, None])[:, 0], **close
    )
    np.testing.assert_allclose(
        columns["teacher_entropy"], [reference.entropy(row) for row in logprobs], **close
    )
    assert columns["top1_id"].tolist() == logprobs.argmax(-1).tolist()
    np.testing.assert_allclose(columns["top1_logprob"], logprobs.max(-1).values, **close)
    if signal.signal in ("hidden", "full"):
        assert np.isneginf(columns["log_tail_mass"]).all()  # nothing is left out
        assert signal.signal == "full" or np.array_equal(columns["states"], to_numpy(hidden))
        return
    p = signal.signal_p if signal.signal == "nucleus" else 1.0
    ids, wanted, tails = reference.compress(
        logits, signal.signal_k, p, 4 if signal.signal == "nucleus" else 1
    )
    assert [[i for i in row if i >= 0] for row in columns["ids"].tolist()] == ids
    for row in range(7):
        np.testing.assert_allclose(columns["logprobs"][row, : len(wanted[row])], wanted[row], **close)
    np.testing.assert_allclose(columns["log_tail_mass"], tails, **close)


def test_bfloat16_travels_as_its_bits() -> None:
    tensor = torch.randn(3, 4).to(torch.bfloat16)
    array = to_numpy(tensor)
    assert array.dtype == np.uint16
    assert torch.equal(torch.from_numpy(array).view(torch.bfloat16), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_logits_are_those_of_the_head(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(5, 8).to(dtype), torch.randn(31, 8).to(dtype)
    head = Head(weight, softcap=3.0)
    kept = kept_of(hidden, head, torch.zeros(5, dtype=torch.long), SignalSection(signal="full"), 29)
    stored = teacher_columns(KINDS["full"], hidden, head, kept, 29)["logits"]
    expected = reference.head_logits(hidden, {"weight": weight, "softcap": 3.0}, 29).to(dtype)
    assert stored.shape == (5, 29)
    torch.testing.assert_close(stored, expected)


def test_rows_of_one_prompt_are_scored_in_one_forward() -> None:
    rows = [make_record(i, prompt=10, completion=2 + i, prompt_id=f"p{i % 3}") for i in range(9)]
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
    assert packed_batches(lengths, None, 40, rows) == [[8, 5, 2], [7, 4, 1], [6, 3, 0]]
    assert packed_batches(lengths, None, 1000, rows) == [[8, 5, 2, 7, 4, 1, 6, 3, 0]]
    alone = [make_record(i, prompt=10, completion=2 + i) for i in range(9)]
    assert packed_batches(lengths, None, 40, alone) == packed_batches(lengths, None, 40)


@pytest.mark.parametrize("signal", ["topk", "hidden", "full"])
def test_rows_that_share_prompts_are_scored_as_rows_alone(tmp_path: Path, signal: str) -> None:
    """Log-probabilities, entropies and signals, by the plain teacher."""
    found = []
    for packing in ("on", "off"):
        run = make_run(
            tmp_path / packing,
            **(TINY | {"group_size": 4, "packing": packing, "signal": signal, "teacher_dtype": "fp32"}),
            dtype="fp32",
            gen_micro_batch=8,
        )
        write_rollouts(run, student_of(run))
        rows = cache.open(run.config.cache_root)[:]
        found.append(rows)
    assert len({row.prompt_id for row in found[0]}) == 4
    assert len(found[0]) == len(found[1]) == 16
    for shared, alone in zip(*found, strict=True):
        assert shared.row_id == alone.row_id
        assert np.array_equal(shared.completion_ids, alone.completion_ids)
        for name in ("teacher_logprobs", "teacher_entropy", "log_tail_mass"):
            np.testing.assert_allclose(getattr(shared, name), getattr(alone, name), atol=1e-5, rtol=1e-5)
        for name in {"topk": ["logprobs"], "hidden": ["states"], "full": ["logits"]}[signal]:
            left, right = (np.asarray(getattr(row.signal, name), np.float64) for row in (shared, alone))
            np.testing.assert_allclose(left, right, atol=2e-5, rtol=1e-5)
