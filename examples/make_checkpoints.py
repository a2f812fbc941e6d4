"""Makes what `pipeline.yaml` uses: problems, tokenizer, teacher and warm-started student, all from seeds.

    python examples/make_checkpoints.py --out examples/arithmetic          (some minutes on a GPU, about 20 on
    two CPU cores)

* tokenizer: whole words, single digits, single characters for all else (unknown words fall apart into
characters);
* teacher: a Qwen3-architecture model of 2.2 M parameters, trained from scratch on 120,000 written-out
solutions;
* student: the teacher with the MLP of every layer pruned from 640 to 96 neurons (those with the largest
|activation| x
  ||down-projection column||), then fine-tuned for a few steps until it solves about a third of the held-out
  problems.
  It inherits the teacher's attention and embeddings, so it is an easy student: the demo shows the mechanism
  at work, not
  how hard distillation can be.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from word_problems import NAMES, THINGS, Problem, check, problems

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
PIECES = r" ?[A-Za-z]+| ?[^\sA-Za-z\d]|\d|\s"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_TOKENS = 112
TEACHER = Qwen3Config(
    vocab_size=0,
    hidden_size=224,
    intermediate_size=640,
    num_hidden_layers=4,
    num_attention_heads=7,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=512,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    tie_word_embeddings=True,
)
STUDENT_NEURONS = 96


def make_tokenizer(sample: Iterable[Problem]) -> PreTrainedTokenizerFast:
    """Words of `sample`, with a character fallback; every digit is a token of its own."""
    texts = [text for p in sample for text in (p.question, p.solution)]
    words = {piece for text in texts for piece in re.findall(PIECES, text)}
    words |= {space + w for w in NAMES + THINGS for space in ("", " ")}
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    pieces = [PAD, END, USER, ASSISTANT, *characters, *sorted(words - set(characters))]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerFast, num_problems: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [P, MAX_TOKENS] int16, right-padded, and labels of the same shape (-100 outside the
    completion).
    """
    pool = list(problems("train", num_problems, seed))
    prompts = tokenizer([f"{USER}{p.question}{ASSISTANT}" for p in pool])["input_ids"]
    completions = tokenizer([f"{p.solution}{END}" for p in pool])["input_ids"]
    ids = torch.full((len(pool), MAX_TOKENS), tokenizer.pad_token_id, dtype=torch.int16)
    labels = torch.full((len(pool), MAX_TOKENS), -100, dtype=torch.int16)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion, dtype=torch.int16)
        labels[row, len(prompt) : end] = torch.tensor(completion, dtype=torch.int16)
    return ids, labels


def fine_tune(
    model, data, *, steps: int, horizon: int, lr: float, warmup: int, seed: int, bf16: bool, log
) -> None:
    """Cross-entropy on the completions: AdamW, warm-up, cosine to 5 % at `horizon` steps, batch 64, clipping
    at 1.
    """
    ids, labels = data
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        share = min(1.0, step / horizon)
        rate = lr * min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(ids), (64,), generator=order)
        width = int((ids[rows] != 0).sum(1).max())
        batch, target = ids[rows, :width].long().to(device), labels[rows, :width].long().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), target[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log(step + 1, loss.item())


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    pool: Sequence[Problem],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 100,
    do_sample: bool = False,
) -> list[str]:
    """One completion of every problem, at temperature 0 or sampled at temperature 1."""
    model.eval()
    device = next(model.parameters()).device
    texts: list[str] = []
    for start in range(0, len(pool), batch_size):
        prompts = [f"{USER}{p.question}{ASSISTANT}" for p in pool[start : start + batch_size]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        out = model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            top_k=0 if do_sample else None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, pool: Sequence[Problem]) -> float:
    """Share of `pool` solved at temperature 0."""
    texts = complete(model, tokenizer, pool)
    return sum(check({"answer": p.answer}, text) for p, text in zip(pool, texts, strict=True)) / len(pool)


@torch.no_grad()
def prune(teacher: Qwen3ForCausalLM, data, num_neurons: int) -> Qwen3ForCausalLM:
    """The teacher with `num_neurons` MLP neurons a layer, kept by mean |activation| x norm of the
    down-projection column.
    """
    device = next(teacher.parameters()).device
    activations: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, i=i: activations.__setitem__(i, args[0].abs().float().mean((0, 1)))
        )
        for i, layer in enumerate(teacher.model.layers)
    ]
    teacher.eval()(input_ids=data[0][:256].long().to(device))
    for hook in hooks:
        hook.remove()
    config = copy.deepcopy(teacher.config)
    config.intermediate_size = num_neurons
    student = Qwen3ForCausalLM(config).to(device)
    state = teacher.state_dict()
    for i, layer in enumerate(teacher.model.layers):
        keep = (
            (activations[i] * layer.mlp.down_proj.weight.float().norm(dim=0))
            .topk(num_neurons)
            .indices.sort()
            .values
        )
        prefix = f"model.layers.{i}.mlp."
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            state[f"{prefix}{name}.weight"] = state[f"{prefix}{name}.weight"].index_select(dim, keep)
    student.load_state_dict(state)
    return student


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Qwen3ForCausalLM:
    """Writes a bf16 checkpoint with its tokenizer and returns it as it will be loaded."""
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    device = next(model.parameters()).device
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def write_problems(out: Path, name: str, split: str, num_problems: int, seed: int) -> None:
    rows = [
        {"question": p.question, "answer": p.answer, "solution": p.solution}
        for p in problems(split, num_problems, seed)
    ]
    (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("examples/arithmetic"))
    parser.add_argument("--teacher_steps", type=int, default=2400)
    parser.add_argument("--student_steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    start = time.time()
    tokenizer = make_tokenizer(problems("train", 20_000, seed=0))
    write_problems(options.out, "train.jsonl", "train", 3000, seed=options.seed + 1)
    write_problems(options.out, "heldout.jsonl", "heldout", 300, seed=options.seed + 1)
    tuning = list(
        problems("heldout", 400, seed=options.seed + 2)
    )  # other draws than the shipped held-out file
    data = encode(tokenizer, 120_000, seed=options.seed)
    print(f"{len(tokenizer)} tokens, data after {time.time() - start:.0f} s", flush=True)

    config = copy.deepcopy(TEACHER)
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, None
    teacher = Qwen3ForCausalLM(config).to(options.device)

    def log(step: int, loss: float, every: int = 200) -> None:
        if step % every == 0 or step < 3:
            print(f"teacher step {step}: loss {loss:.3f} after {time.time() - start:.0f} s", flush=True)

    fine_tune(
        teacher,
        data,
        steps=options.teacher_steps,
        horizon=options.teacher_steps,
        lr=2e-3,
        warmup=50,
        seed=options.seed,
        bf16=True,
        log=log,
    )
    teacher = save(teacher, tokenizer, options.out / "teacher")
    print(
        f"teacher: {teacher.num_parameters():,} parameters, solves"
        f" {accuracy(teacher, tokenizer, tuning):.1%}",
        flush=True,
    )

    student = prune(teacher, data, STUDENT_NEURONS)
    fine_tune(
        student,
        data,
        steps=options.student_steps,
        horizon=160,
        lr=1e-3,
        warmup=10,
        seed=options.seed + 1,
        bf16=False,
        log=lambda *_: None,
    )
    student = save(student, tokenizer, options.out / "student")
    print(
        f"student: {student.num_parameters():,} parameters, solves {accuracy(student, tokenizer, tuning):.1%}"
    )
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
