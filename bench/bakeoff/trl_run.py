"""TRL's DistillationTrainer, on-policy, with its student's weights copied at points of time.

    python -m bench.bakeoff.trl_run SPEC.json

SPEC: see `Spec`. It imports neither `stages` nor `dualkl`: with vLLM it runs on that payload's packages.

Settings: fp32 weights under bf16 autocast, the teacher in bf16; no gradient checkpointing; fused AdamW
without weight decay; the same warm-up as ours, then a cosine to a tenth of the rate over the time there is,
which a user could only guess. The loss is its reverse KL over the whole vocabulary (beta 1, its default).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl

from bench.bakeoff.snapshots import Snapshots, end_with_parent
from bench.trl_peer import distillation_trainer

LR_MIN_RATIO = 0.1  # as stages/loops/steps.py
MAX_STEPS = 100_000  # time ends it


@dataclass(frozen=True)
class Spec:
    """One run: `prompts` are texts as the chat template renders them, `seconds` what training may take."""

    student: str
    teacher: str
    prompts: list[str]
    folder: str
    every: float
    seconds: float
    device: str
    dtype: str
    batch_size: int
    max_prompt_tokens: int
    max_new_tokens: int
    warmup_steps: int
    max_grad_norm: float
    lr: float
    beta: float
    seed: int
    use_vllm: bool


def lr_factor(spec: Spec, step: int, elapsed: float) -> float:
    """Learning rate of 0-based `step`, relative to the peak: warm-up by steps, then a cosine over seconds."""
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    share = min(1.0, elapsed / spec.seconds)
    return LR_MIN_RATIO + (1 - LR_MIN_RATIO) * 0.5 * (1 + math.cos(math.pi * share))


class Clock(TrainerCallback):
    """Begins and looks at the snapshots, counts tokens, and ends training when its time is over."""

    def __init__(self, spec: Spec, snapshots: Snapshots) -> None:
        self.spec, self.snapshots = spec, snapshots
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        _synchronize(self.spec.device)
        started = time.perf_counter()
        yield
        _synchronize(self.spec.device)
        self.seconds[name] += time.perf_counter() - started

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.snapshots.begin(dict(others["model"].named_parameters()))

    def on_step_end(
        self, args: Any, state: Any, control: TrainerControl, **others: Any
    ) -> TrainerControl | None:
        _synchronize(self.spec.device)
        is_last = self.snapshots.elapsed() >= self.spec.seconds
        self.snapshots.look(state.global_step, is_last, tokens=self.tokens)
        control.should_training_stop = control.should_training_stop or is_last
        return control


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    end_with_parent()
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    snapshots = Snapshots(spec.every, spec.device)
    clock = Clock(spec, snapshots)
    trainer_of(spec, clock).train()
    phases = dict(clock.seconds)
    phases["total"] = snapshots.points[-1]["seconds"]
    phases["other"] = phases["total"] - sum(clock.seconds.values())
    snapshots.save(
        Path(spec.folder), phases=phases, trained_tokens=clock.tokens, rows_per_step=spec.batch_size
    )


def trainer_of(spec: Spec, clock: Clock) -> Any:
    torch.manual_seed(spec.seed)
    tokenizer = AutoTokenizer.from_pretrained(spec.student, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(spec.student, dtype=torch.float32).to(spec.device)
    dtype = torch.bfloat16 if spec.dtype == "bf16" else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(spec.teacher, dtype=dtype).to(spec.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.lr, weight_decay=0.0, fused=spec.device == "cuda"
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(spec, step, clock.snapshots.elapsed())
    )
    return distillation_trainer(
        clock.part,
        on_tokens=lambda lengths: setattr(clock, "tokens", clock.tokens + sum(lengths)),
        model=model,
        teacher_model=teacher,
        prompts=spec.prompts,
        processing_class=tokenizer,
        callbacks=[clock],
        optimizers=(optimizer, schedule),
        arguments=_arguments(spec),
    )


def _arguments(spec: Spec) -> dict[str, Any]:
    vllm = {
        "use_vllm": True,
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": spec.max_prompt_tokens + spec.max_new_tokens,
        "generation_kwargs": {"detokenize": False},
    }
    return {
        "output_dir": f"{spec.folder}/trl",
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": spec.batch_size,
        "max_completion_length": spec.max_new_tokens,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "bf16": spec.dtype == "bf16",
        "tf32": True if spec.device == "cuda" else None,
        "use_cpu": spec.device == "cpu",
        "beta": spec.beta,
        "learning_rate": spec.lr,
        "max_grad_norm": spec.max_grad_norm,
        "seed": spec.seed,
        **(vllm if spec.use_vllm else {}),
    }


if __name__ == "__main__":
    main()
