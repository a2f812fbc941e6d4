"""Both stages on a real pretrained pair on the CPU, in bf16 with LoRA and in fp32 with all weights: `make
real`.

    python bench/real/check.py [--models .real/models]

For each precision 48 rollouts with three refreshes, and then: cached logprobs against a forward of
transformers in fp32, memory after each refresh, the probe, losses, and that the exported student writes text.
Prints a line a check; exit code 1 if one fails. Some five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.real.models import real_pair

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "What is the capital of Italy?",
    "Name two colours of the rainbow.",
    "How many days are in a week?",
    "Write a short sentence about rain.",
    "What do bees make?",
    "Which is larger, the sun or the moon?",
    "Say hello in French.",
    "What is 7 plus 5?",
    "Name a fruit that is red.",
    "Why do people sleep?",
    "What is ice made of?",
    "Complete: the cat sat on the",
]
SIZES: dict[str, Any] = {
    "device": "cpu",
    "num_prompts": 0,
    "max_new_tokens": 12,
    "max_prompt_tokens": 64,
    "answer_checker": "",
    "rollouts_per_refresh": 12,
    "rollouts_per_unit": 6,
    "group_size": 1,
    "batch_size": 12,
    "grad_accum": 1,
    "lp_micro_batch": 4,
    "gen_micro_batch": 12,
    "max_steps": 4,
    "refresh_every": 1,
    "warmup_steps": 0,
    "checkpoint_every": 100,
    "signal_k": 32,
    "teacher_ds_zero3": "true",
    "micro_batch_tokens": 256,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "eval_every": 0,
    "chat_template_kwargs": "{}",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16", "teacher_dtype": "bf16", "use_lora": "true", "lr": 2e-4},
    "fp32": {"dtype": "fp32", "teacher_dtype": "fp32", "use_lora": "false", "lr": 1e-5},
}
NEAR = {"bf16": 0.08, "fp32": 1e-3}
"""Nats a token, mean: between cached logprobs and a forward in fp32."""
_failed: list[str] = []


def check(name: str, right: bool, found: str) -> None:
    print(f"{'ok' if right else 'FAILED'} {name}: {found}", flush=True)
    if not right:
        _failed.append(name)


def run_stages(runs: Path, name: str, models: tuple[Path, Path], dataset: Path) -> None:
    teacher, student = models
    values = (
        SIZES
        | VARIANTS[name]
        | {
            "run_name": name,
            "runs_dir": runs,
            "teacher_model": teacher,
            "student_model": student,
            "dataset": dataset,
        }
    )
    flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    for stage in ("rollout", "train"):
        started = time.perf_counter()
        command = [sys.executable, "-m", f"stages.{stage}", "--config", "pipeline.yaml", *flags]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
        check(
            f"{name}: stages.{stage}",
            done.returncode == 0,
            f"exit code {done.returncode}, {time.perf_counter() - started:.0f} s",
        )


def check_logprobs(run: Path, name: str, models: tuple[Path, Path]) -> None:
    """Teacher's of all rows; behaviour of the rows that the untrained student wrote."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    import cache

    snapshot = cache.open(str(run / "cache"))
    rows = [snapshot[i] for i in range(len(snapshot))]
    check(f"{name}: rollouts", len(rows) == 48, str(len(rows)))

    def exact(model: Any, row: cache.Record) -> np.ndarray:
        ids = torch.tensor(np.concatenate([row.prompt_ids, row.completion_ids]), dtype=torch.long)[None]
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        return logprobs.gather(1, ids[0, len(row.prompt_ids) :, None])[:, 0].numpy()

    untrained = [row for row in rows if row.refresh_index == 0]
    for what, path, own in (("teacher", models[0], rows), ("behaviour", models[1], untrained)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        gaps = np.concatenate([getattr(row, f"{what}_logprobs") - exact(model, row) for row in own])
        found = float(np.abs(gaps).mean())
        check(
            f"{name}: {what} logprobs",
            found <= NEAR[name],
            f"{found:.2g} nats a token from fp32, {gaps.size} tokens",
        )


def check_records(run: Path, name: str, teacher_bytes: float) -> None:
    import math

    from stages.runtime import metrics

    records = metrics.read(run / "metrics.jsonl")
    steps, refreshes = ([r for r in records if r["kind"] == kind] for kind in ("step", "refresh"))
    losses = [step["loss"] for step in steps]
    finite = all(math.isfinite(step[key]) for step in steps for key in ("loss", "grad_norm"))
    check(f"{name}: steps", len(losses) == 4 and finite, f"losses {losses}")
    growth = (
        max((r["memory_allocated_bytes"] for r in refreshes), default=0)
        - refreshes[0]["memory_allocated_bytes"]
    )
    check(
        f"{name}: memory over {len(refreshes)} refreshes",
        growth <= 0.01 * teacher_bytes,
        f"{growth:,} bytes of growth",
    )
    probe = [f"{r['probe_gap']:.2g} of {r['probe_bound']:.2g}" for r in refreshes]
    within = all(r["probe_gap"] <= r["probe_bound"] and r["probe_moved"] > 0 for r in refreshes)
    check(f"{name}: probe", within and len(probe) == 3, f"gaps {', '.join(probe)} nats a token")


def check_export(run: Path, name: str) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "student"
    loader: Any = (
        AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else AutoModelForCausalLM
    )
    model, tokenizer = (
        loader.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    chat = [{"role": "user", "content": PROMPTS[0]}]
    inputs: Any = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    start = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, start:]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    check(
        f"{name}: the exported student", any(letter.isalpha() for letter in text), f"{PROMPTS[0]} -> {text!r}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=Path, default=ROOT / ".real" / "models", help="where the pair is, or goes"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / ".real" / "runs")
    options = parser.parse_args()
    started = time.perf_counter()
    models = real_pair(options.models.resolve())
    print(f"{models[0]} and {models[1]} after {time.perf_counter() - started:.0f} s", flush=True)
    shutil.rmtree(options.runs, ignore_errors=True)
    options.runs.mkdir(parents=True)
    dataset = options.runs.resolve() / "prompts.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    for name in VARIANTS:
        run = options.runs.resolve() / name
        run_stages(run.parent, name, models, dataset)
        if f"{name}: stages.train" in _failed or f"{name}: stages.rollout" in _failed:
            continue
        size = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
        check_records(run, name, size * (2 if name == "fp32" else 1))
        check_logprobs(run, name, models)
        check_export(run, name)
    print(f"{len(_failed)} checks failed, {time.perf_counter() - started:.0f} s in all", flush=True)
    sys.exit(1 if _failed else 0)


if __name__ == "__main__":
    main()
