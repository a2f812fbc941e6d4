"""`bench/stage_one.py`, part scoring: the cost of selection, copies, encoding and writing beside the bare
forward.

scoring   a Qwen3-32B-shaped teacher, plain: tokens/s of its backbone, of backbone and lm_head at the scored
          positions (`bare`), and of `stages.loops.scoring` with top-64 selection, encoding and writing to a
          cache (`scored`).
sharing   a Qwen3-8B-shaped teacher, plain: rows scored and written a second, in groups of four completions of
          512 tokens, with prompts of 1,024 or 256 tokens that are read once a group (`shared`) or once a row.
          `sharing/alone`: groups of one, with sharing allowed and off; both run the same forwards.
zero3     a Qwen3-8B-shaped teacher under ZeRO-3 on two cards against a plain copy on each, 16,384 tokens per
          forward, and log-probabilities of both at 4,096 tokens (`bench/stage_one_zero3.py`).

Nothing is read from disk or left there. Rates are medians of repeats in one process over the same random
tokens (products of equal rows draw less power and run faster): 128 prompt and 512 completion tokens, 80 % of
positions scored. A unit is five forwards here and about forty by default, so the fixed cost of a unit weighs
more.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import cache
from bench.cells import Bench, Cell
from bench.measuring import ROOT, Record, peak_gib, reset_peak, synchronize
from dualkl.divergences import gather_logprobs
from stages.data.alignment import align, at_scored
from stages.loops.progress import Counts, Progress
from stages.loops.scoring import Scoring, score_rows
from stages.loops.writing import UnitWriter
from stages.models import teacher as teachers
from stages.models.teacher import Teacher
from stages.runtime.config import SignalSection
from stages.runtime.run import Run, open_run

VOCABULARY = 151_936
SHAPES: dict[str, dict[str, int]] = {
    "32B": {
        "hidden_size": 5120,
        "intermediate_size": 25_600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
SOURCES = (
    "bench/cells.py",
    "bench/measuring.py",
    "bench/stage_one_teacher.py",
    "bench/stage_one_zero3.py",
    "stages/**/*.py",
    "cache/*.py",
    "dualkl/**/*.py",
)


@dataclass(frozen=True)
class Size:
    """How much is measured: rows of `prompt` and `completion` tokens, `tokens` of them in a forward,
    `repeats` times.

    `warm_up`: rows of the run before those that count.
    """

    prompt: int = 128
    completion: int = 512
    rows: int = 125
    tokens: int = 16_384
    repeats: int = 2
    warm_up: int = 25
    equality_tokens: int = 4096
    vocabulary: int = VOCABULARY
    k: int = 64
    group: int = 1


FULL, TINY = Size(), Size(6, 10, 12, 64, 2, 4, 48, 503, 8)
SHARING: dict[str, tuple[int, int, int]] = {
    "1024": (1024, 4, 128),
    "256": (256, 4, 128),
    "alone": (1024, 1, 64),
}
"""Tokens of a prompt, rows of a group, rows."""


def teacher_config(shape: str, size: Size) -> Qwen3Config:
    tiny = shape == "tiny"
    return Qwen3Config(
        vocab_size=size.vocabulary,
        num_key_value_heads=2 if tiny else 8,
        head_dim=16 if tiny else 128,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        initializer_range=0.03,
        **SHAPES[shape],
    )


def make_teacher_model(
    shape: str, size: Size, device: str, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A Qwen3 model of that shape with seeded weights, drawn on the device in bf16 whatever its dtype."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            teacher_config(shape, size), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    if dtype != torch.bfloat16:
        model.to(dtype)
    teachers.restore_buffers(model)  # drawn in bf16 with the rest; loading keeps them in fp32
    return model.eval().requires_grad_(False)


def unscored_rows(size: Size, seed: int = 0) -> list[cache.Record]:
    """A unit of random tokens, as if generated."""
    dice = np.random.default_rng(seed)
    prompts = dice.integers(0, size.vocabulary, (-(-size.rows // size.group), size.prompt))
    noise = -dice.random(size.completion)
    return [
        cache.Record(
            row_id=f"{i:032x}",
            prompt_id=f"p{i // size.group}",
            occurrence=0,
            sample_index=i % size.group,
            refresh_index=0,
            run_id="bench",
            policy_step=0,
            policy_hash="0" * 16,
            finish_reason="length",
            prompt_text="",
            completion_text="",
            prompt_ids=prompts[i // size.group],
            completion_ids=dice.integers(0, size.vocabulary, size.completion),
            behaviour_logprobs=noise,
            behaviour_entropy=-noise,
        )
        for i in range(size.rows)
    ]


def bench_run(folder: Path, size: Size, device: str, *flags: str) -> Run:
    arguments = [
        "--student_model",
        "bench",
        "--runs_dir",
        str(folder),
        "--device",
        device,
        "--micro_batch_tokens",
        str(size.tokens),
        *flags,
    ]
    return open_run("", arguments)


def median_rate(
    step: Callable[[list[cache.Record]], int], rows: list[cache.Record], size: Size, device: str
) -> float:
    """Tokens a second; `step` takes rows and returns their tokens.

    One run on few rows before those that count.
    """
    step(rows[: size.warm_up])
    rates = []
    for _ in range(size.repeats):
        synchronize(device)
        started = time.perf_counter()
        tokens = step(rows)
        synchronize(device)
        rates.append(tokens / (time.perf_counter() - started))
    return statistics.median(rates)


def forward_batches(teacher: Teacher, rows: list[cache.Record], size: Size, with_head: bool) -> int:
    """The forwards of these rows alone; `with_head`: and logits at the scored positions, in chunks, thrown
    away.
    """
    num_rows = max(1, size.tokens // (size.prompt + size.completion))
    done = 0
    for start in range(0, len(rows), num_rows):
        batch = rows[start : start + num_rows]
        prompts, completions = [row.prompt_ids for row in batch], [row.completion_ids for row in batch]
        aligned = align(prompts, completions, 0, teacher.device, packed=teacher.packs)
        hidden_BTD = teacher.hidden(aligned)
        if with_head:
            for chunk in at_scored(hidden_BTD, aligned).split(2048):
                chunk @ teacher.head.weight.T
        done += aligned.input_ids.numel()
    return done


def open_cache(root: Path, size: Size) -> cache.Writer:
    signal = {"kind": "topk", "k": size.k, "temperature": 1.0}
    return cache.Writer(root, cache.Fingerprint({"vocab_size": size.vocabulary, "signal": signal}))


def score_and_write(
    run: Run,
    teacher: Teacher,
    rows: list[cache.Record],
    writer: cache.Writer,
    size: Size,
    shares: list[float],
) -> int:
    """A unit by the path of stage one, down to its commit; notes the share of time that waited for the
    writer.
    """
    scoring = Scoring(SignalSection(signal="topk", signal_k=size.k), size.vocabulary, 0)
    counts = Counts(len(rows))
    with UnitWriter(writer) as writing, Progress(run, len(rows)) as progress:
        with progress.phase("score"):
            score_rows(run, rows, scoring, teacher, writing, progress, counts)
        writing.commit("unit")
        with progress.waiting("write"):
            writing.drain()
        shares.append(progress.shares()["write"])
    return counts.scored_tokens


def measure_scoring(size: Size, shape: str, bench: Bench) -> Record:
    """Tokens/s of the backbone, with the head, and scored and written; the latter as a share of `bare`."""
    device = bench.device
    bench.clear()
    reset_peak(device)
    rows = unscored_rows(size)
    with tempfile.TemporaryDirectory() as folder:
        run = bench_run(Path(folder), size, device, "--teacher_ds_zero3", "false")
        teacher = teachers.plain_teacher(
            make_teacher_model(shape, size, device), run.world, run.config.train.packing
        )
        shares: list[float] = []
        backbone = median_rate(lambda some: forward_batches(teacher, some, size, False), rows, size, device)
        bare = median_rate(lambda some: forward_batches(teacher, some, size, True), rows, size, device)
        roots = [
            Path(folder) / f"cache{i}" for i in range(1 + size.repeats)
        ]  # a run opens one, for many units
        with ExitStack() as stack:
            caches = iter([stack.enter_context(open_cache(root, size)) for root in roots])
            scored = median_rate(
                lambda some: score_and_write(run, teacher, some, next(caches), size, shares),
                rows,
                size,
                device,
            )
        assert [len(cache.open(root)) for root in roots] == [size.warm_up] + [len(rows)] * size.repeats
        teacher.close()
    return {
        "backbone_tokens_per_second": backbone,
        "bare_tokens_per_second": bare,
        "scored_tokens_per_second": scored,
        "scored_share_of_bare": scored / bare,
        "scored_share_of_backbone": scored / backbone,
        "share_waiting_for_writer": statistics.median(shares[1:]),
        "peak_gib": peak_gib(device),
    }


def rows_rate(
    run: Run, teacher: Teacher, rows: list[cache.Record], size: Size, folder: Path, device: str
) -> tuple[float, np.ndarray]:
    """Rows scored and written a second, and their teacher logprobs."""
    roots = [folder / str(i) for i in range(1 + size.repeats)]
    with ExitStack() as stack:
        caches = iter([stack.enter_context(open_cache(root, size)) for root in roots])

        def step(some: list[cache.Record]) -> int:
            score_and_write(run, teacher, some, next(caches), size, [])
            return len(some)

        rate = median_rate(step, rows, size, device)
    written = cache.open(roots[-1]).to_table(["teacher_logprobs"])
    return rate, written["teacher_logprobs"].combine_chunks().flatten().to_numpy()


def measure_sharing(name: str, size: Size, shape: str, bench: Bench) -> Record:
    """Rows/s with shared prompts and without, and the mean distance of their logprobs in nats."""
    prompt, group, num_rows = SHARING[name]
    size = replace(size, prompt=prompt, group=group, rows=num_rows, warm_up=24)
    if shape == "tiny":
        size = replace(size, prompt=24, rows=TINY.rows, warm_up=TINY.warm_up)
    model = bench.make("sharing", lambda: make_teacher_model(shape, size, bench.device))
    rows = unscored_rows(size)
    reset_peak(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--teacher_ds_zero3", "false", "--group_size", str(group)]
        run = bench_run(Path(folder), size, bench.device, *flags)
        teacher = teachers.plain_teacher(model, run.world, run.config.train.packing)
        assert teacher.shares
        shared, found = rows_rate(run, teacher, rows, size, Path(folder) / "shared", bench.device)
        teacher = replace(teacher, unshared_because="this measures rows alone")
        alone, expected = rows_rate(run, teacher, rows, size, Path(folder) / "alone", bench.device)
    return {
        "shared_rows_per_second": shared,
        "alone_rows_per_second": alone,
        "shared_over_alone": shared / alone,
        "mean_logprob_gap": float(np.abs(found - expected).mean()),
        "peak_gib": peak_gib(bench.device),
    }


@torch.no_grad()
def logprobs_of(teacher: Teacher, ids: np.ndarray) -> Tensor:
    """Logprobs of each token after the first of one sequence."""
    aligned = align([ids[:1]], [ids[1:]], 0, teacher.device, packed=teacher.packs)
    return gather_logprobs(at_scored(teacher.hidden(aligned), aligned), teacher.head, aligned.targets)


def measure_zero3(size: Size, shape: str, bench: Bench) -> Record:
    """`bench/stage_one_zero3.py` in two processes: one on each card, or both on the CPU."""
    if bench.device == "cuda" and torch.cuda.device_count() < 2:
        raise RuntimeError(f"zero3 needs two GPUs, and torch sees {torch.cuda.device_count()} here")
    bench.clear()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        worker = [str(ROOT / "bench/stage_one_zero3.py"), shape, bench.device, str(found)]
        subprocess.run([sys.executable, *launch, *worker], check=True)
        return json.loads(found.read_text())


def cells(tiny: bool) -> list[Cell]:
    size = TINY if tiny else FULL
    parts: dict[str, tuple[Any, str]] = {"scoring": (measure_scoring, "32B")}
    parts |= {f"sharing/{name}": (partial(measure_sharing, name), "8B") for name in SHARING}
    parts["zero3"] = (measure_zero3, "8B")
    return [
        Cell(name, partial(function, size, "tiny" if tiny else shape), SOURCES)
        for name, (function, shape) in parts.items()
    ]
