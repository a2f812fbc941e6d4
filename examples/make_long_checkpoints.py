"""Trains a teacher and a student on the stories of long_problems.py from scratch, in minutes on one GPU.

    python examples/make_long_checkpoints.py --out .real/long

* teacher: a Qwen3-architecture model of 21 M parameters, trained until it solves `--teacher_target` of the
  tuning problems;
* student: the same with half the width, a quarter of the parameters, stopped at `--student_target`: it writes
  well-formed solutions and calculates badly;
* distil.jsonl and heldout.jsonl: prompts that neither model was trained on.

During training, a problem counts as solved if every token of its written-out solution is the most likely one.
At the end both models, as saved, write the solutions of heldout.jsonl, at temperatures 0 and 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from long_problems import Difficulty, add_difficulty, difficulty_of, problems, row_of
from make_checkpoints import ASSISTANT, END, TEACHER, USER, complete, make_tokenizer, save
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from word_problems import Problem, check

HEADS = 7
GENERATED_TOGETHER = 2000  # problems of one task of a worker; part of the seed
FOUND_BAND = {"teacher": (0.90, 0.97), "student": (0.15, 0.40)}
WELL_FORMED = re.compile(r"The answer is \d+\.\s*$")


@dataclass
class Data:
    """Token ids [P, W] uint8, right-padded, and the lengths [P] of prompts and of whole sequences."""

    ids: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: str) -> Data:
        return Data(*(tensor.to(device) for tensor in (self.ids, self.prompt_lengths, self.lengths)))

    def batch(self, rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels [rows, width] int64; a label is the token at its own position, -100 outside the
        completion.
        """
        ids = self.ids[rows, :width].long()
        at = torch.arange(width, device=ids.device)
        scored = (at >= self.prompt_lengths[rows, None]) & (at < self.lengths[rows, None])
        return ids, ids.masked_fill(~scored, -100)


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # the fields of Data; tensors would take file handles


def _encode(tokenizer: PreTrainedTokenizerFast, pool: Sequence[Problem], width: int) -> Arrays:
    prompts = tokenizer([f"{USER}{p.question}{ASSISTANT}" for p in pool])["input_ids"]
    completions = tokenizer([f"{p.solution}{END}" for p in pool])["input_ids"]
    ids = np.zeros((len(pool), width), np.uint8)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, : len(prompt) + len(completion)] = (
            prompt + completion
        )  # an error if it is longer than `width`
    starts = np.array([len(prompt) for prompt in prompts])
    return ids, starts, starts + [len(completion) for completion in completions]


def _task(arguments: tuple[PreTrainedTokenizerFast, int, int, str, Difficulty]) -> Arrays:
    tokenizer, num_problems, width, seed, by = arguments
    return _encode(tokenizer, list(problems("train", num_problems, seed, by, distinct=False)), width)


def make_data(
    tokenizer: PreTrainedTokenizerFast, num_problems: int, width: int, seed: int, by: Difficulty, workers: int
) -> Data:
    """Problems of the training split, the same whatever the number of worker processes."""
    starts = range(0, num_problems, GENERATED_TOGETHER)
    counts = [min(GENERATED_TOGETHER, num_problems - start) for start in starts]
    tasks = [(tokenizer, n, width, f"{seed}-{i}", by) for i, n in enumerate(counts)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        parts = pool.map(_task, tasks, chunksize=1)
    return Data(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)))


def batches(lengths: torch.Tensor, num_tokens: int, seed: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(width, rows) without end: rows of about equal length, `num_tokens` with the padding.

    What does not fill a batch waits for the next epoch, which is shuffled anew.
    """
    order = torch.Generator().manual_seed(seed)
    widths = (lengths + 15) // 16 * 16
    while True:
        epoch = []
        for width in widths.unique().tolist():
            rows = (widths == width).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows), generator=order)]
            size = max(1, num_tokens // width)
            epoch += [(width, rows[i : i + size]) for i in range(0, len(rows) - size + 1, size)]
        if not epoch:
            raise ValueError(f"{len(lengths)} problems do not fill a batch of {num_tokens} tokens.")
        for at in torch.randperm(len(epoch), generator=order).tolist():
            yield epoch[at]


def make_model(
    tokenizer: PreTrainedTokenizerFast, width: int, num_layers: int, seed: int
) -> Qwen3ForCausalLM:
    """Seven heads, an MLP three times as wide as the hidden state, weights drawn from the seed."""
    if width % (2 * HEADS):
        raise ValueError(f"the width is {width}; expected a multiple of {2 * HEADS}.")
    config: Qwen3Config = copy.deepcopy(TEACHER)
    config.hidden_size, config.intermediate_size, config.head_dim = width, 3 * width, width // HEADS
    config.num_attention_heads = config.num_key_value_heads = HEADS
    config.num_hidden_layers, config.layer_types = num_layers, ["full_attention"] * num_layers
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, None
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def share_solved(model: Qwen3ForCausalLM, data: Data, bf16: bool, rows: int = 250) -> float:
    """Share of problems whose solution the model would write at temperature 0, found in one forward."""
    model.eval()
    solved, width = 0, int(data.lengths.max())
    for part in torch.arange(len(data.lengths), device=data.ids.device).split(rows):
        ids, labels = data.batch(part, width)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            likely = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        solved += int(((likely == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1).sum())
    model.train()
    return solved / len(data.lengths)


class Clock:
    """How far the learning rate has come: step / steps, or fewer steps if they do not fit in `seconds`."""

    def __init__(self, steps: int, seconds: float, measured: int = 60) -> None:
        self.steps, self.seconds, self.measured = steps, seconds, measured
        self.start = self.after_first = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def tick(self, step: int, finish: Callable[[], object]) -> None:
        """After each step: measures some, after the first third of them, which compiled."""
        if step not in (self.measured // 3, self.measured):
            return
        finish()
        if step < self.measured:
            self.after_first = time.perf_counter()
            return
        each = (time.perf_counter() - self.after_first) / (step - self.measured // 3)
        fits = step + int(0.95 * (self.seconds - self.elapsed()) / each)
        print(f"{1000 * each:.1f} ms a step, {fits} steps fit in {self.seconds:.0f} s", flush=True)
        self.steps = max(step + 1, min(self.steps, fits))


def train(
    model: Qwen3ForCausalLM, data: Data, tuning: Data, options: argparse.Namespace, name: str
) -> tuple[int, float]:
    """Cross-entropy on the completions, AdamW, warm-up, cosine to 2 %. Returns the steps taken and the share
    solved; stops at the target.
    """
    value = {key.removeprefix(f"{name}_"): x for key, x in vars(options).items() if key.startswith(name)}
    device, clock = data.ids.device, Clock(value["steps"], value["seconds"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=value["lr"], betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    plan = batches(data.lengths.cpu(), options.batch_tokens, options.seed + (name == "student"))
    finish = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    model.train()
    step, solved, losses = 0, 0.0, []
    while step < clock.steps and clock.elapsed() < value["seconds"] and solved < value["target"]:
        warm, cosine = (
            min(1.0, (step + 1) / options.warmup),
            0.5 + 0.5 * math.cos(math.pi * step / clock.steps),
        )
        for group in optimizer.param_groups:
            group["lr"] = value["lr"] * warm * (0.02 + 0.98 * cosine)
        losses.append(_step(model, optimizer, data, next(plan), options.bf16))
        step += 1
        clock.tick(step, finish)
        if step % value["eval_every"] == 0 or step == clock.steps:
            solved = share_solved(model, tuning, options.bf16)
            loss, losses = torch.stack(losses).mean().item(), []
            seconds, rate = clock.elapsed(), group["lr"]
            print(
                f"{name} step {step} of {clock.steps}: loss {loss:.4f}, solved {solved:.1%}, lr {rate:.2e},"
                f" {seconds:.0f} s, {step * options.batch_tokens / seconds:,.0f} tokens/s",
                flush=True,
            )
    return step, solved


def _step(
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    data: Data,
    batch: tuple[int, torch.Tensor],
    bf16: bool,
) -> torch.Tensor:
    """One update; returns the loss without waiting for the device."""
    ids, labels = data.batch(batch[1].to(data.ids.device, non_blocking=True), batch[0])
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def report(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, heldout: Sequence[Problem], name: str
) -> dict[str, float | int]:
    """Prints and returns what the saved model does on held-out problems, in its own words."""
    found: dict[str, float | int] = {"parameters": model.num_parameters()}
    for kind in ("greedy", "sampled"):
        torch.manual_seed(0)
        texts = complete(
            model, tokenizer, heldout, max_new_tokens=160, batch_size=500, do_sample=kind == "sampled"
        )
        solved = [check({"answer": p.answer}, text) for p, text in zip(heldout, texts, strict=True)]
        found[kind] = sum(solved) / len(heldout)
        found[f"{kind}_well_formed"] = sum(bool(WELL_FORMED.search(text)) for text in texts) / len(heldout)
        for p, text in list(zip(heldout, texts, strict=True))[:2]:
            print(f"{name}, {kind}: {p.question}\n  wrote    {text[:300]}\n  expected {p.solution}")
    print(f"{name}: " + json.dumps(found), flush=True)
    return found


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".real/long"))
    add_difficulty(parser)
    parser.add_argument(
        "--num_train", type=int, default=1_600_000, help="problems; reused when all were seen"
    )
    parser.add_argument("--num_distil", type=int, default=10_000)
    parser.add_argument("--num_heldout", type=int, default=500)
    parser.add_argument("--num_tuning", type=int, default=1000, help="problems that decide when to stop")
    parser.add_argument("--batch_tokens", type=int, default=32_768)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    for name, width, steps, seconds, target, every in (
        ("teacher", 448, 12_000, 270.0, 0.94, 200),
        ("student", 224, 4000, 75.0, 0.24, 20),
    ):
        parser.add_argument(f"--{name}_width", type=int, default=width)
        parser.add_argument(f"--{name}_layers", type=int, default=8)
        parser.add_argument(f"--{name}_lr", type=float, default=1e-3)
        parser.add_argument(f"--{name}_steps", type=int, default=steps, help="at most")
        parser.add_argument(
            f"--{name}_seconds", type=float, default=seconds, help="at most, fewer steps then"
        )
        parser.add_argument(f"--{name}_target", type=float, default=target, help="share solved to stop at")
        parser.add_argument(f"--{name}_eval_every", type=int, default=every, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", choices=("teacher", "student"), default=None, help="train one of the two")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are forked
    options.out.mkdir(parents=True, exist_ok=True)
    start, by = time.perf_counter(), difficulty_of(options)
    files = {"distil": options.num_distil, "heldout": options.num_heldout, "tuning": options.num_tuning}
    pools = {split: list(problems(split, n, options.seed, by)) for split, n in files.items()}
    for split in ("distil", "heldout"):
        lines = (json.dumps(row_of(p)) + "\n" for p in pools[split])
        (options.out / f"{split}.jsonl").write_text("".join(lines))
    tokenizer = make_tokenizer(problems("train", 5000, options.seed, by))
    width = 56 + 40 * options.max_steps
    data = make_data(tokenizer, options.num_train, width, options.seed, by, options.workers)
    tuning = Data(*map(torch.from_numpy, _encode(tokenizer, pools["tuning"], width)))
    lengths = data.lengths.float()
    print(
        f"{len(lengths):,} problems, {lengths.mean():.0f} tokens on average, {lengths.max():.0f} at most,"
        f" {(data.lengths - data.prompt_lengths).max()} in a completion, {len(tokenizer)} in the vocabulary;"
        f" {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    data, tuning, is_right = data.to(options.device), tuning.to(options.device), True
    for name in [options.only] if options.only else ["teacher", "student"]:
        is_right &= make_one(name, options, tokenizer, data, tuning, pools["heldout"])
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0 if is_right else 1


def make_one(
    name: str,
    options: argparse.Namespace,
    tokenizer: PreTrainedTokenizerFast,
    data: Data,
    tuning: Data,
    heldout: Sequence[Problem],
) -> bool:
    """Trains, saves and measures one model; whether its share solved is in the band it should be in."""
    width, layers = (getattr(options, f"{name}_{key}") for key in ("width", "layers"))
    model = make_model(tokenizer, width, layers, options.seed).to(options.device)
    print(f"{name}: {model.num_parameters():,} parameters", flush=True)
    if options.compile:
        from stages.models.student import compile_layers

        compile_layers(model)
    start = time.perf_counter()
    steps, solved = train(model, data, tuning, options, name)
    seconds = time.perf_counter() - start
    found = report(save(model, tokenizer, options.out / name), tokenizer, heldout, name)
    record = found | {"steps": steps, "seconds": round(seconds, 1), "tuning": solved}
    values = {key: str(x) if isinstance(x, Path) else x for key, x in vars(options).items()}
    (options.out / f"{name}.json").write_text(json.dumps({"result": record, "options": values}, indent=1))
    low, high = FOUND_BAND[name]
    if not low <= found["greedy"] <= high:
        print(
            f"{name} solves {found['greedy']:.1%} of held-out problems; {low:.0%} to {high:.0%} are wanted."
        )
    return low <= found["greedy"] <= high


if __name__ == "__main__":
    sys.exit(main())
