"""LoRA's first updates in bfloat16, which are far below a rounding step of the weights: trainer against
generator.

    python bench/early_updates.py                         about a minute on one H100 or H200
    python bench/early_updates.py --lr 1e-4 --steps 12

`sums`: the share of `low`, at 2^-12 of x W', that reaches the output of several forms of x W' + low (1: all
of it), and their milliseconds.

`student`: a Qwen3-0.6B-shaped student (seeded random weights, LoRA r 64, layers not compiled) takes AdamW
steps on random text; the learning rate is warmed up over eight of them. Before each step, distances in nats
per token (mean absolute and signed mean) to the same student in fp32: of the forward that trains, of the
forward without gradients (probe, evaluation), and of the generator; and of the last two to each other, which
is what a refresh checks. Writes early_updates.json with device and versions.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.measuring import measure
from bench.real_shapes import SHAPES, TINY
from stages.data.alignment import align, at_scored
from stages.engine.opening import open_engine
from stages.loops.probe import generator_logprobs, trainer_logprobs
from stages.models.student import Student, assemble
from stages.runtime.config import parse_arguments

RANK = 64
PROMPT_TOKENS, NEW_TOKENS, ROWS = 64, 192, 8
WARMUP_STEPS = 8
GEMMS = ((4096, 1024, 3072), (16_384, 1024, 2048), (16_384, 2560, 9728), (16_384, 9728, 2560))
"""Tokens, width before, width after."""


def forms(x_TK: Tensor, w_NK: Tensor, z_Tr: Tensor, b_Nr: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to x W' + z B'. The last has its weights joined beforehand."""
    low_TN = z_Tr @ b_Nr.t()
    joined_weight = torch.cat([w_NK, b_Nr], 1)
    found = {
        "sum": lambda: x_TK @ w_NK.t() + low_TN,
        "addmm": lambda: torch.addmm(low_TN, x_TK, w_NK.t()),
        "baddbmm": lambda: torch.baddbmm(low_TN[None], x_TK[None], w_NK.t()[None])[0],
        "one product": lambda: torch.cat([x_TK, z_Tr], 1) @ joined_weight.t(),
    }
    if x_TK.is_cuda:
        found["fp32 sum"] = lambda: (torch.mm(x_TK, w_NK.t(), out_dtype=torch.float32) + low_TN).bfloat16()
    return found


def measure_sums(device: str, gemms: tuple[tuple[int, int, int], ...], seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for num_tokens, width_in, width_out in gemms:
        torch.manual_seed(0)
        x_TK = torch.randn(num_tokens, width_in, device=device).bfloat16()
        w_NK = torch.randn(width_out, width_in, device=device).mul_(0.02).bfloat16()
        a_rK = torch.randn(RANK, width_in, device=device).mul_(width_in**-0.5).bfloat16()
        scale = 2**-12 * 0.02 * width_in**0.5 * RANK**-0.5
        b_Nr = torch.randn(width_out, RANK, device=device).mul_(scale).bfloat16()
        z_Tr = x_TK @ a_rK.t()
        base_TN, low_TN = x_TK.double() @ w_NK.double().t(), z_Tr.double() @ b_Nr.double().t()
        shape = found.setdefault(f"{num_tokens} x {width_in} x {width_out}", {})
        shape["low / x W'"] = float(low_TN.std() / base_TN.std())
        for name, form in forms(x_TK, w_NK, z_Tr, b_Nr).items():
            moved_TN = form().double() - base_TN
            share = float((moved_TN * low_TN).sum() / low_TN.square().sum())
            shape[name] = {"share": share, "ms": measure(form, device, seconds).median}
            del moved_TN
    return found


def make_student(device: str, tiny: bool, folder: Path) -> Student:
    config = Qwen3Config(
        vocab_size=512 if tiny else 151_936,
        num_key_value_heads=2 if tiny else 8,
        head_dim=16 if tiny else 128,
        tie_word_embeddings=True,
        **(TINY if tiny else SHAPES["student"]),
    )
    torch.manual_seed(1)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    flags = [
        "--student_model",
        str(folder),
        "--teacher_model",
        str(folder),
        "--compile",
        "false",
        "--lora_r",
        str(RANK),
    ]
    options = parse_arguments([*flags, "--dtype", "bf16", "--use_lora", "--device", device], "")
    tokenizer = cast(PreTrainedTokenizerBase, SimpleNamespace(pad_token_id=0))
    student = assemble(options, base, tokenizer, "random", config.vocab_size, (1,), torch.device(device))
    student.model.to(device)
    return student


def distance(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    return {"mean": float(np.abs(a - b).mean()), "signed": float((a - b).mean())}


def measure_student(student: Student, lr: float, num_steps: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    rows: Any = [
        SimpleNamespace(
            prompt_ids=random.integers(2, student.vocab_size, PROMPT_TOKENS).astype(np.int32),
            completion_ids=random.integers(2, student.vocab_size, NEW_TOKENS).astype(np.int32),
        )
        for _ in range(ROWS)
    ]
    engine = open_engine(student.model)
    prompts, completions = [r.prompt_ids for r in rows], [r.completion_ids for r in rows]
    aligned = align(prompts, completions, 0, student.device, packed=student.packs)

    def exact() -> np.ndarray:
        in_fp32 = replace(student, model=copy.deepcopy(student.model).float(), compute_dtype=torch.float32)
        return trainer_logprobs(in_fp32, rows)

    optimizer = torch.optim.AdamW(student.trainable.values(), weight_decay=0.0)
    found, before = [], exact()
    for step in range(num_steps + 1):
        truth, probe, generator = (
            exact(),
            trainer_logprobs(student, rows),
            generator_logprobs(student, engine, rows),
        )
        logits = at_scored(student.hidden(aligned), aligned).float() @ student.head.weight.float().t()
        losses = torch.nn.functional.cross_entropy(logits, aligned.targets.long(), reduction="none")
        record = {
            "step": step,
            "moved": distance(truth, before),
            "training_fp32": distance(-losses.detach().cpu().numpy(), truth),
            "probe_fp32": distance(probe, truth),
            "generator_fp32": distance(generator, truth),
            "generator_probe": distance(generator, probe),
        }
        found.append(record)
        print(json.dumps(record), flush=True)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP_STEPS)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lr", type=float, default=8e-5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one timing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does everything run?")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    gemms = ((512, 256, 256),) if options.tiny else GEMMS
    found = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "lr": options.lr,
        "sums": measure_sums(options.device, gemms, options.seconds),
    }
    print(json.dumps(found["sums"], indent=1), flush=True)
    student = make_student(options.device, options.tiny, options.out)
    found["student"] = measure_student(student, options.lr, options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "early_updates.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
