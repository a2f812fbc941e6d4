"""Planned against measured peak memory of one GPU, phase by phase, with seeded random weights in place of
downloads.

    python bench/plan_check.py          Qwen3-0.6B-shaped student, 4B-shaped teacher (bench/real_shapes.py)
    python bench/plan_check.py --rows 128 --new_tokens 512 --score_tokens auto

Takes less than 5 minutes. One card, the teacher whole (teacher_ds_zero3 false), 64-token prompts. Each phase
is the stages' own: the rollout engine writes a unit, the scorer reads it while the engine is open and commits
it to a cache, two optimizer steps train on that cache (the second is measured, when the optimizer's state is
there). A line is printed as soon as its phase is measured, and plan_check.json is written with device and
versions. Exit code 1 if a phase is more than 15 % off.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.modeling_utils import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cache
from bench.real_shapes import SHAPES, TINY
from stages.data.prompts import Prompt
from stages.engine.opening import open_engine
from stages.loops import schedule, setup, steps
from stages.loops.collect import plan, slots_for, write_unit
from stages.loops.feed import global_batches
from stages.loops.planning import Machine, make_plan
from stages.loops.progress import Counts, Progress
from stages.loops.scoring import Scoring, score_rows
from stages.loops.writing import UnitWriter
from stages.models import student as students
from stages.models import teacher as teachers
from stages.models.memory import GIB
from stages.models.speed import GPUS
from stages.models.student import Student
from stages.runtime.checkpoint import Position
from stages.runtime.config import Config, parse_arguments
from stages.runtime.run import Run, open_run

TOLERANCE = 0.15
PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Options:
    folder: Path
    device: str = "cuda"
    tiny: bool = False
    rows: int = 64
    new_tokens: int = 256
    score_tokens: str = "16384"


class Peak(Protocol):
    """`reset` begins a phase, `read` gives its peak in bytes."""

    def reset(self) -> None: ...
    def read(self) -> int: ...


class CudaPeak:
    def reset(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def read(self) -> int:
        return torch.cuda.max_memory_allocated()


@dataclass(frozen=True)
class Row:
    phase: str
    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.planned / self.measured

    @property
    def is_within(self) -> bool:
        return abs(self.ratio - 1) <= TOLERANCE

    def __str__(self) -> str:
        note = "" if self.is_within else f"  beyond {100 * TOLERANCE:.0f} %"
        return (
            f"{self.phase:<10}{self.planned / GIB:>13.2f}{self.measured / GIB:>14.2f}{self.ratio:>8.2f}{note}"
        )


TITLE = f"{'phase':<10}{'planned GiB':>13}{'measured GiB':>14}{'ratio':>8}"


def arguments(options: Options) -> list[str]:
    """The configuration that is planned and run, as flags; writes the two config.json it names."""
    for role in SHAPES:
        _model_config(role, options.tiny).save_pretrained(options.folder / role)
    rows = 4 if options.tiny else options.rows
    return [
        "--student_model",
        str(options.folder / "student"),
        "--teacher_model",
        str(options.folder / "teacher"),
        "--teacher_ds_zero3",
        "false",
        "--max_prompt_tokens",
        str(PROMPT_TOKENS),
        "--gen_micro_batch",
        str(rows),
        "--max_new_tokens",
        "8" if options.tiny else str(options.new_tokens),
        "--rollouts_per_unit",
        str(rows),
        "--micro_batch_tokens",
        "512" if options.tiny else options.score_tokens,
        "--rollouts_per_refresh",
        str(rows),
        "--group_size",
        "1",
        "--batch_size",
        str(rows),
        "--grad_accum",
        "1",
        "--max_steps",
        "2",
        "--refresh_every",
        "0",
        "--device",
        options.device,
    ]


def _model_config(role: str, tiny: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=512 if tiny else 151_936,
        num_key_value_heads=2 if tiny else 8,
        head_dim=16 if tiny else 128,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
        **(TINY if tiny else SHAPES[role]),
    )


def measure(options: Options, peak: Peak) -> Iterator[tuple[str, int]]:
    """Each phase and its peak bytes, the models loaded as in a run of one process."""
    with tempfile.TemporaryDirectory() as folder:
        run = open_run("", [*arguments(options), "--runs_dir", folder])
        student = _student(run, options)
        yield from _stage_one(run, student, options, peak)
        training = steps.prepare(run, student)
        pool, snapshot = schedule.open_pool(run, Position(0, 0))
        for batch in global_batches(run, student, snapshot, pool, range(2), training.caps):
            peak.reset()
            steps.train_step(run, training, pool, batch)
        yield "train", peak.read()


def _stage_one(run: Run, student: Student, options: Options, peak: Peak) -> Iterator[tuple[str, int]]:
    """One unit, generated and scored and committed, as `collect` does it."""
    model = _random_model("teacher", options).requires_grad_(False)
    teacher = teachers.plain_teacher(model, run.world, run.config.train.packing)
    del model
    policy, config = setup.student_policy(run, student, open_engine(student.model), 0), run.config
    rows = config.rollout.rollouts_per_unit
    (unit,) = plan(
        _prompts(rows),
        seed=0,
        run_id=run.run_id,
        policy_hash=policy.policy_hash,
        refresh_index=0,
        num_rollouts=rows,
        group_size=1,
        rollouts_per_unit=rows,
    )
    kept = {"kind": "topk", "k": config.teacher_signal.signal_k, "temperature": 1.0}
    fingerprint = cache.Fingerprint({"vocab_size": student.vocab_size, "signal": kept})
    scoring = Scoring(config.teacher_signal, student.vocab_size, 0)
    with (
        closing(policy.engine),
        cache.Writer(config.cache_root, fingerprint) as writer,
        UnitWriter(writer) as writing,
        Progress(run, rows) as progress,
    ):
        peak.reset()
        written = write_unit(unit, policy, slots_for(run, policy, scores_too=True))
        yield "generate", peak.read()
        peak.reset()
        score_rows(run, written, scoring, teacher, writing, progress, Counts())
        writing.commit(unit.name)
        yield "score", peak.read()
    teacher.close()


def _random_model(role: str, options: Options) -> PreTrainedModel:
    torch.manual_seed(1 if role == "student" else 2)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(
            _model_config(role, options.tiny), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    teachers.restore_buffers(model)
    return model.eval()


class _Tokens:
    """As much of a tokenizer as rows of random ids need."""

    pad_token_id = 0

    def decode(self, ids: np.ndarray, skip_special_tokens: bool) -> str:
        return ""


def _student(run: Run, options: Options) -> Student:
    tokenizer: Any = _Tokens()
    base = _random_model("student", options)
    size = base.config.vocab_size
    student = students.assemble(run.config, base, tokenizer, "random", size, (size - 1,), run.world.device)
    student.model.to(run.world.device)
    return student


def _prompts(count: int) -> list[Prompt]:
    random = np.random.default_rng(0)
    return [
        Prompt(f"p{i}", random.integers(1, 500, PROMPT_TOKENS).astype(np.int32), "", {}) for i in range(count)
    ]


def planned_peaks(options: Options, gib: float) -> dict[str, float]:
    """Of one card of `gib` GiB; the card's speed plays no part."""
    config: Config = parse_arguments(arguments(options), "")
    return {phase.name: phase.peak for phase in make_plan(config, Machine(GPUS["h100"], 1, gib)).phases}


def compare(options: Options, gib: float, peak: Peak) -> Iterator[Row]:
    """A row for each phase, as soon as it is measured."""
    planned = planned_peaks(options, gib)
    for phase, measured in measure(options, peak):
        yield Row(phase, planned[phase], measured)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=64, help="rollouts generated at once, and in a training forward"
    )
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--score_tokens", default="16384", help="a number or auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/plan_check"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it measures a GPU's memory, and torch sees no GPU here")
    options = Options(
        given.folder, rows=given.rows, new_tokens=given.new_tokens, score_tokens=given.score_tokens
    )
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    shapes = {"rows": given.rows, "new_tokens": given.new_tokens, "score_tokens": given.score_tokens}
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine, "shapes": shapes, "phases": {}}
    rows = []
    print(TITLE, flush=True)
    for row in compare(options, torch.cuda.get_device_properties(0).total_memory / GIB, CudaPeak()):
        print(row, flush=True)
        rows.append(row)
        found["phases"][row.phase] = {"planned": row.planned, "measured": row.measured, "ratio": row.ratio}
        (given.out / "plan_check.json").write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(0 if all(row.is_within for row in rows) else 1)


if __name__ == "__main__":
    main()
