"""Planned against measured peak memory of one GPU, phase by phase, with seeded random weights in place of downloads.

    python bench/plan_check.py                 Qwen3-0.6B-shaped student, 4B-shaped teacher (bench/real_shapes.py), < 5 minutes
    python bench/plan_check.py --rows 128 --new_tokens 512 --score_tokens 32768

One card, the teacher whole (teacher_ds_zero3 false), 64-token prompts. Writes plan_check.json with device and versions; exit code
1 if a phase is more than 15 % off. `generate` is measured with the rollout engine of this tree.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.modeling_utils import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.real_shapes import SHAPES, TINY
from dualkl import Sampled, TopKTeacher
from dualkl.targets import compress
from stages.data.alignment import Aligned, align, at_scored
from stages.data.batches import MicroBatch
from stages.loops.fit import StudentLoss, loss_config
from stages.loops.planning import Machine, make_plan
from stages.models.generation import Sampling, generate
from stages.models.memory import GIB
from stages.models.speed import GPUS
from stages.models.student import Student
from stages.runtime.config import Config, parse_arguments

TOLERANCE = 0.15
PROMPT_TOKENS = 64
PHASES = ("generate", "score", "train")


@dataclass(frozen=True)
class Options:
    folder: Path
    device: str = "cuda"
    tiny: bool = False
    rows: int = 64
    new_tokens: int = 256
    score_tokens: int = 16_384


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


def compare(planned: dict[str, float], measured: dict[str, int]) -> list[Row]:
    return [Row(phase, planned[phase], measured[phase]) for phase in PHASES]


def table(rows: list[Row]) -> str:
    lines = [f"{'phase':<10}{'planned GiB':>13}{'measured GiB':>14}{'ratio':>8}"]
    for row in rows:
        note = "" if row.is_within else f"  beyond {100 * TOLERANCE:.0f} %"
        lines.append(f"{row.phase:<10}{row.planned / GIB:>13.2f}{row.measured / GIB:>14.2f}{row.ratio:>8.2f}{note}")
    return "\n".join(lines)


def configuration(options: Options) -> Config:
    """The configuration that is planned; writes the two config.json it names."""
    for role in SHAPES:
        _model_config(role, options.tiny).save_pretrained(options.folder / role)
    rows = 4 if options.tiny else options.rows
    return parse_arguments([
        "--student_model", str(options.folder / "student"), "--teacher_model", str(options.folder / "teacher"),
        "--teacher_ds_zero3", "false", "--max_prompt_tokens", str(PROMPT_TOKENS), "--gen_micro_batch", str(rows),
        "--max_new_tokens", "8" if options.tiny else str(options.new_tokens), "--rollouts_per_unit", str(rows),
        "--score_tokens", "512" if options.tiny else str(options.score_tokens), "--lp_micro_batch", str(rows),
        "--batch_size", str(rows), "--grad_accum", "1",
    ], "")  # fmt: skip


def _model_config(role: str, tiny: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=512 if tiny else 151_936, num_key_value_heads=2 if tiny else 8, head_dim=16 if tiny else 128,
        tie_word_embeddings=True, max_position_embeddings=40_960, **(TINY if tiny else SHAPES[role]),
    )  # fmt: skip


def measure(options: Options, peak: Peak) -> dict[str, int]:
    """Peak bytes of each phase, the models loaded as in a run of one process."""
    config = configuration(options)
    student = _student(config, options)
    teacher = _random_model("teacher", options).requires_grad_(False)
    found = {}
    peak.reset()
    _generate(config, student)
    found["generate"] = peak.read()
    peak.reset()
    _score(config, teacher)
    found["score"] = peak.read()
    del teacher
    student.model.train()
    student.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(student.trainable.values(), lr=1e-4)
    _train_step(config, student, optimizer)  # makes the optimizer's state
    peak.reset()
    _train_step(config, student, optimizer)
    return found | {"train": peak.read()}


def _random_model(role: str, options: Options) -> PreTrainedModel:
    torch.manual_seed(1 if role == "student" else 2)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(_model_config(role, options.tiny), dtype=torch.bfloat16)
    return model.eval()


def _student(config: Config, options: Options) -> Student:
    """The student under LoRA, adapters in fp32, as `load_student` leaves it; no tokenizer is used here."""
    lora = config.lora
    model = get_peft_model(
        _random_model("student", options),
        LoraConfig(r=lora.lora_r, lora_alpha=lora.lora_alpha, target_modules=lora.lora_targets, task_type="CAUSAL_LM"),
    )
    tokenizer: Any = None
    return Student(model, tokenizer, "random", model.config.vocab_size, (0,), torch.bfloat16)


def _prompts(config: Config, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, 500, PROMPT_TOKENS).astype(np.int32) for _ in range(count)]


def _aligned(config: Config, count: int, device: torch.device) -> Aligned:
    length = config.rollout.max_new_tokens
    random = np.random.default_rng(1)
    completions = [random.integers(1, 500, length).astype(np.int32) for _ in range(count)]
    return align(_prompts(config, count), completions, 0, device)


def _generate(config: Config, student: Student) -> None:
    rows = int(config.rollout.gen_micro_batch)
    with student.autocast():
        generate(
            student.model, _prompts(config, rows), list(range(rows)), Sampling(config.rollout.max_new_tokens),
            vocab_size=student.vocab_size, eos_ids=(student.vocab_size - 1,), pad_id=0, micro_batch=rows,
        )  # fmt: skip


@torch.no_grad()
def _score(config: Config, teacher: PreTrainedModel) -> None:
    longest = PROMPT_TOKENS + config.rollout.max_new_tokens
    count = max(1, min(int(config.rollout.lp_micro_batch), int(config.rollout.score_tokens) // longest))
    aligned = _aligned(config, count, teacher.device)
    output = teacher.get_decoder()(input_ids=aligned.input_ids, attention_mask=aligned.attention_mask, use_cache=False)
    hidden_ND = at_scored(output.last_hidden_state, aligned)
    del output
    compress(hidden_ND, teacher.get_output_embeddings().weight, aligned.targets, k=config.teacher_signal.signal_k)


def _train_step(config: Config, student: Student, optimizer: torch.optim.Optimizer) -> None:
    aligned = _aligned(config, config.train.batch_size, student.device)
    num, k = len(aligned.targets), config.teacher_signal.signal_k
    ids_NK = torch.arange(k, device=student.device).expand(num, k)
    mass = torch.full((num, k), 0.9 / k, device=student.device).log()
    tail_N = torch.full((num,), 0.1, device=student.device).log()
    none_N = torch.zeros(num, device=student.device)
    weights_N = torch.full((num,), 1 / num, device=student.device)
    teacher = TopKTeacher(ids_NK, mass, tail_N)
    batch = MicroBatch(aligned, teacher, Sampled(aligned.targets, none_N, none_N), weights_N)
    loss, _ = StudentLoss(student, loss_config(config, student.vocab_size))(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def planned_peaks(config: Config, gib: float) -> dict[str, float]:
    """Of one card of `gib` GiB; the card's speed plays no part."""
    return {phase.name: phase.peak for phase in make_plan(config, Machine(GPUS["h100"], 1, gib)).phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rollouts generated at once, and in a training forward")
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--score_tokens", type=int, default=16_384)
    parser.add_argument("--folder", type=Path, default=Path("runs/plan_check"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    given = parser.parse_args()
    options = Options(given.folder, rows=given.rows, new_tokens=given.new_tokens, score_tokens=given.score_tokens)
    gib = torch.cuda.get_device_properties(0).total_memory / GIB
    rows = compare(planned_peaks(configuration(options), gib), measure(options, CudaPeak()))
    print(table(rows))
    given.out.mkdir(parents=True, exist_ok=True)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    shapes = {"rows": given.rows, "new_tokens": given.new_tokens, "score_tokens": given.score_tokens}
    peaks = {row.phase: {"planned": row.planned, "measured": row.measured, "ratio": row.ratio} for row in rows}
    text = json.dumps({"machine": machine, "shapes": shapes, "phases": peaks}, indent=1)
    (given.out / "plan_check.json").write_text(text)
    raise SystemExit(0 if all(row.is_within for row in rows) else 1)


if __name__ == "__main__":
    main()
