"""Both stages at real shapes, with seeded random weights instead of downloads.

    python bench/real_shapes.py --tokenizer tokenizer.json[.zst] --dataset gsm8k/train.jsonl
    python bench/real_shapes.py ... --only memory --processes 2     under torchrun, a GPU each
    python bench/real_shapes.py ... --device cpu --tiny             does everything run?

A Qwen3-0.6B-shaped student and a Qwen3-4B-shaped teacher (vocabulary 151,936, bf16) in three parts
(`--only`):

zero3    the ZeRO-3 teacher against the plain model at 2,048 tokens: log-probabilities and last hidden state,
         both against fp32
stages   `stages.rollout` and `stages.train` on 512 prompts x 4, 256 new tokens, through one refresh
memory   six refreshes of 640 rollouts, each scored in forwards of many shapes: memory allocated after each

Writes real_shapes.json: the figures of each part with device and versions. Parts on N processes are named
`stages_on_N` and `memory_on_N`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cache
from dualkl.divergences import gather_logprobs
from stages.data.alignment import align, at_scored
from stages.models.teacher import Teacher, load_teacher, load_zero3
from stages.runtime import config as configuration
from stages.runtime import distributed, metrics

SHAPES = {
    "student": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "teacher": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
    " }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_model(role: str, folder: Path, tokenizer: PreTrainedTokenizerFast, tiny: bool, device: str) -> None:
    """A Qwen3 checkpoint with seeded random weights; the teacher's are drawn wider, so that its text has
    structure.
    """
    if (folder / "config.json").exists():
        return
    shape = TINY if tiny else SHAPES[role]
    model_config = Qwen3Config(
        vocab_size=151_936,
        num_key_value_heads=8 if not tiny else 2,
        head_dim=128 if not tiny else 16,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        initializer_range=0.02 if role == "student" else 0.03,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    torch.manual_seed(1 if role == "student" else 2)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    data = path.read_bytes()
    if path.suffix == ".zst":
        import zstandard

        data = zstandard.ZstdDecompressor().decompress(data)
    plain = Path("tokenizer.tmp.json")
    plain.write_bytes(data)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(plain), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    plain.unlink()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def check_zero3(models: Path, device: str, num_tokens: int = 2048) -> dict[str, float]:
    """Distances of the plain and the ZeRO-3 bf16 teacher from the fp32 model, on the same random tokens."""
    world = distributed.start(device)
    arguments = ["--teacher_model", str(models / "teacher"), "--device", device]
    rows = np.random.default_rng(0).integers(100, 151_000, (2, num_tokens))
    aligned = align(list(rows[:, :1]), list(rows[:, 1:]), 0, world.device)

    def score(load: Callable[..., Teacher], *extra: str) -> tuple[torch.Tensor, torch.Tensor]:
        loaded = load(configuration.parse_arguments([*arguments, *extra], ""), world)
        hidden = at_scored(loaded.hidden(aligned), aligned)
        logprobs = gather_logprobs(hidden, loaded.head, aligned.targets)
        hidden = hidden.float()
        loaded.close()
        return hidden, logprobs

    exact_hidden, exact = score(load_teacher, "--teacher_ds_zero3", "false", "--teacher_dtype", "fp32")
    plain_hidden, plain = score(load_teacher, "--teacher_ds_zero3", "false")
    zero3_hidden, zero3 = score(load_zero3)

    def relative(hidden: torch.Tensor) -> float:
        return float((hidden - exact_hidden).norm() / exact_hidden.norm())

    return {
        "tokens": num_tokens,
        "max_logprob_gap_zero3_plain": float((zero3 - plain).abs().max()),
        "max_logprob_gap_plain_fp32": float((plain - exact).abs().max()),
        "max_logprob_gap_zero3_fp32": float((zero3 - exact).abs().max()),
        "hidden_relative_error_plain": relative(plain_hidden),
        "hidden_relative_error_zero3": relative(zero3_hidden),
        "hidden_bit_equal": float(torch.equal(zero3_hidden, plain_hidden)),
    }


def run_stages(models: Path, dataset: Path, device: str, tiny: bool, processes: int) -> dict[str, Any]:
    """stages.rollout, then stages.train through one refresh; rates, of all processes together, from the
    records they leave.
    """
    shutil.rmtree("runs/real_shapes", ignore_errors=True)
    size = [
        "--num_prompts",
        "512",
        "--rollouts_per_refresh",
        "2048",
        "--max_new_tokens",
        "256",
        "--batch_size",
        "256",
    ]
    tiny_size = [
        "--num_prompts",
        "8",
        "--rollouts_per_refresh",
        "32",
        "--max_new_tokens",
        "8",
        "--batch_size",
        "8",
    ]
    common = _common(
        models,
        dataset,
        device,
        "real_shapes",
        [
            *(tiny_size if tiny else size),
            "--group_size",
            "4",
            "--grad_accum",
            "4",
            "--gen_micro_batch",
            "512",
            "--rollouts_per_unit",
            "512",
            "--lp_micro_batch",
            "64",
            "--micro_batch_tokens",
            "32768",
            "--max_steps",
            "8",
            "--refresh_every",
            "4",
        ],
    )
    started = time.perf_counter()
    for stage in ("rollout", "train"):
        _launch(stage, common, processes)
    records = metrics.read(Path("runs/real_shapes/metrics.jsonl"))
    clocks = {r["start"]: r for r in records if r["kind"] == "clock"}.values()
    seconds = {phase: sum(c[phase] for c in clocks) for phase in metrics.PHASES}
    snapshot = cache.open("runs/real_shapes/cache")
    summary = snapshot.summary()
    steps = [r for r in records if r["kind"] == "step"]
    prompt_tokens = sum(snapshot.index.column("num_prompt_tokens").to_pylist())
    trained = sum(r["tokens"] for r in steps)
    return {
        "rollouts": summary["rows"],
        "completion_tokens": summary["scored_tokens"],
        "prompt_tokens": prompt_tokens,
        "rollouts_per_second": summary["rows"] / seconds["rollout"],
        "generated_tokens_per_second": summary["scored_tokens"] / seconds["rollout"],
        "scored_tokens_per_second": (summary["scored_tokens"] + prompt_tokens) / seconds["score"],
        "trained_completion_tokens_per_second": trained / sum(r["seconds"] for r in steps),
        "median_step_seconds": sorted(r["seconds"] for r in steps)[len(steps) // 2],
        "cache_bytes_per_token": summary["bytes_per_token"],
        "signal_bytes_per_token": summary["signal_bytes_per_token"],
        "peak_gib": {r["stage"]: r["peak_memory_bytes"] / 2**30 for r in records if r["kind"] == "memory"},
        "seconds": seconds | {"wall": time.perf_counter() - started},
        "first_step": steps[0],
        "last_step": steps[-1],
    }


def run_memory(models: Path, dataset: Path, device: str, tiny: bool, processes: int) -> dict[str, Any]:
    """Memory allocated after each of six refreshes, and its largest growth in weights of the teacher that a
    process holds.
    """
    shutil.rmtree("runs/memory", ignore_errors=True)
    size = [
        "--num_prompts",
        "512",
        "--rollouts_per_refresh",
        "640",
        "--max_new_tokens",
        "128",
        "--micro_batch_tokens",
        "8192",
        "--rollouts_per_unit",
        "160",
    ]
    tiny_size = [
        "--num_prompts",
        "64",
        "--rollouts_per_refresh",
        "32",
        "--max_new_tokens",
        "8",
        "--micro_batch_tokens",
        "512",
        "--rollouts_per_unit",
        "16",
    ]
    common = _common(
        models,
        dataset,
        device,
        "memory",
        [
            *(tiny_size if tiny else size),
            "--batch_size",
            "32",
            "--group_size",
            "2",
            "--grad_accum",
            "1",
            "--max_steps",
            "14",
            "--refresh_every",
            "2",
            "--warmup_steps",
            "2",
            "--checkpoint_every",
            "50",
        ],
    )
    for stage in ("rollout", "train"):
        _launch(stage, common, processes)
    records = [r for r in metrics.read(Path("runs/memory/metrics.jsonl")) if r["kind"] == "refresh"]
    after = [r["memory_allocated_bytes"] for r in records]
    weights = sum(path.stat().st_size for path in (models / "teacher").glob("*.safetensors")) / processes
    return {
        "allocated_bytes_after_refresh": after,
        "teacher_bytes_a_process": weights,
        "largest_growth_in_teachers": (max(after) - after[0]) / weights,
        "probe_gap": [r["probe_gap"] for r in records],
    }


def _launch(stage: str, flags: list[str], processes: int) -> None:
    launcher = (
        ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        if processes > 1
        else []
    )
    subprocess.run([sys.executable, "-m", *launcher, f"stages.{stage}", *flags], check=True)


def _common(models: Path, dataset: Path, device: str, name: str, more: list[str]) -> list[str]:
    return [
        "--student_model",
        str(models / "student"),
        "--teacher_model",
        str(models / "teacher"),
        "--dataset",
        str(dataset),
        "--device",
        device,
        "--run_name",
        name,
        "--teacher_ds_zero3",
        "--max_prompt_tokens",
        "512",
        *more,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--only", choices=["zero3", "stages", "memory"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=1, help="of `stages` and `memory`")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does everything run?")
    options = parser.parse_args()
    started = time.perf_counter()
    tokenizer = load_tokenizer(options.tokenizer)
    for role in SHAPES:
        make_model(role, options.models / role, tokenizer, options.tiny, options.device)
    print(f"models made after {time.perf_counter() - started:.0f} s", flush=True)
    parts = {
        "stages": lambda: run_stages(
            options.models, options.dataset, options.device, options.tiny, options.processes
        ),
        "memory": lambda: run_memory(
            options.models, options.dataset, options.device, options.tiny, options.processes
        ),
        "zero3": lambda: check_zero3(
            options.models, options.device
        ),  # last: it sets this process up for DeepSpeed
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "real_shapes.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    machine = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip(),
    }
    for name, part in parts.items():
        if options.only in (None, name):
            key = f"{name}_on_{options.processes}" if name != "zero3" and options.processes > 1 else name
            found[key] = part() | {"machine": machine}
            path.write_text(json.dumps(found, indent=1))
            print(
                key,
                json.dumps(found[key], indent=1),
                f"after {time.perf_counter() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
