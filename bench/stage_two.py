"""Stage two: training a Qwen3-4B-shaped student from a cache, against TRL's SFTTrainer on the same rows.

    python bench/stage_two.py                        every cell; none begins after 8 minutes
    python bench/stage_two.py --only packed 'trl*'   some of them
    python bench/stage_two.py --table                a Markdown table of bench/results/stage_two.json

Seeded random weights, LoRA r 64 on all linear layers, gradient checkpointing, prompts of 64 to 192 tokens
with 512-token completions, a cache of synthetic top-64 rows on disk, forwards of 16,384 tokens. Ours is the
run's own `train_step`, fed by the run's own reader. Figures are from the steps after the first two:

tokens_per_second   prompt and completion, without padding
mfu                 4 N per token (N: frozen weights without embeddings) and 4 V d per scored position (the
                    head), over the rate of a large bf16 product measured in the same call; attention and
                    recomputation are not counted
wait_share          share of the time spent waiting for the reader
gib_above_weights   peak memory beyond base and adapter weights
rows_per_second     of the step's rows; cells `shared` and `alone` have groups of four rows with prompts of
                    1,024 or 256 tokens, read once a group or once a row
parts               our cells: seconds by class of kernel in one more step, profiled (`bench/parts.py`)
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.modeling_utils import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cache
from bench import parts
from bench.cells import Bench, Cell, Program
from bench.measuring import Found, Record, markdown, peak_gib, release, reset_peak, synchronize, version
from stages.loops import feed, schedule, steps
from stages.models import student as students
from stages.models.student import Student
from stages.runtime import metrics
from stages.runtime.checkpoint import Position
from stages.runtime.run import Run, open_run

PACKAGES = ("transformers", "peft", "trl", "liger-kernel", "flash-attn")
SOURCES = (
    "bench/cells.py",
    "bench/measuring.py",
    "bench/parts.py",
    "bench/stage_two.py",
    "dualkl/**/*.py",
    "stages/data/*.py",
    "stages/loops/feed.py",
    "stages/loops/steps.py",
    "stages/models/*.py",
)
WARM_UP = 2  # steps


@dataclass(frozen=True)
class Setting:
    """The model, the rows and the step that all cells share."""

    model: Qwen3Config
    dtype: str
    prompt_tokens: tuple[int, int]
    completion_tokens: int
    k: int
    forward_tokens: int
    rows_per_step: int
    num_steps: int
    lora_r: int
    group: int = 1
    shares: bool = True

    @property
    def num_rows(self) -> int:
        return 2 * self.rows_per_step


REAL = Setting(
    Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    ),
    "bf16",
    (64, 193),
    512,
    64,
    16_384,
    96,
    5,
    64,
)
TINY = Setting(
    Qwen3Config(
        vocab_size=503,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
    "fp32",
    (2, 7),
    12,
    8,
    64,
    8,
    4,
    4,
)


@dataclass(frozen=True)
class Steps:
    """What a cell's run yields: seconds and waiting of each step after the first two, and its peak memory
    above weights.
    """

    seconds: list[float]
    waited: list[float]
    gib_above_weights: float | None
    note: str = ""
    profile: parts.Profile | None = None


# --- the rows ---


def write_rows(setting: Setting, root: Path) -> None:
    """A cache of synthetic rows: random tokens, and at each of them a random distribution over k ids and a
    tail.
    """
    random = np.random.default_rng(0)
    must_match = {
        "vocab_size": setting.model.vocab_size,
        "signal": {"kind": "topk", "k": setting.k, "temperature": 1.0},
    }
    with cache.Writer(root, cache.Fingerprint(must_match, {})) as writer:
        prompt = None
        for number in range(setting.num_rows):
            row = _row(setting, number, random)
            prompt = row.prompt_ids if number % setting.group == 0 or prompt is None else prompt
            writer.append(replace(row, prompt_ids=prompt))
        writer.commit("synthetic")


def _row(setting: Setting, number: int, random: np.random.Generator) -> cache.Record:
    tokens, k, size = setting.completion_tokens, setting.k, setting.model.vocab_size
    masses = random.exponential(size=(tokens, k + 1))
    masses = -np.sort(-masses / masses.sum(1, keepdims=True), axis=1)
    logprobs = np.log(masses).astype(np.float32)
    first = random.integers(0, size - k * 7, tokens)
    ids = first[:, None] + 7 * np.arange(k)  # distinct
    signal = cache.TopK(ids, logprobs[:, :k], logprobs[:, k], 1.0)
    return cache.Record(
        row_id=f"{number:032x}",
        prompt_id=f"p{number // setting.group}",
        occurrence=0,
        sample_index=number % setting.group,
        refresh_index=0,
        run_id="bench",
        policy_step=0,
        policy_hash="0" * 16,
        finish_reason="length",
        prompt_text="",
        completion_text="",
        prompt_ids=random.integers(2, size, random.integers(*setting.prompt_tokens)),
        completion_ids=ids[:, 0].astype(np.int32),
        behaviour_logprobs=logprobs[:, 0],
        behaviour_entropy=np.ones(tokens, np.float32),
        teacher_logprobs=logprobs[:, 0],
        teacher_entropy=np.ones(tokens, np.float32),
        log_tail_mass=logprobs[:, k],
        top1_id=ids[:, 0].astype(np.int32),
        top1_logprob=logprobs[:, 0],
        signal=signal,
    )


# --- ours ---


def base_model(setting: Setting, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(setting.model, dtype=dtype, attn_implementation="sdpa")


def make_student(run: Run, setting: Setting) -> Student:
    """A student as `load_student` makes it, of weights that are drawn on the device."""
    base = base_model(setting, run.world.device.type)
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    return students.assemble(
        run.config, base, tokenizer, "bench", setting.model.vocab_size, (1,), run.world.device
    )


def ours(setting: Setting, device: str, folder: Path, keys: dict[str, str]) -> Steps:
    """The run's own steps over the synthetic cache, and one more under the profiler."""
    flags = {
        "student_model": "bench",
        "runs_dir": folder,
        "cache_dir": folder / "cache",
        "device": device,
        "dtype": setting.dtype,
        "lora_r": setting.lora_r,
        "batch_size": setting.rows_per_step,
        "group_size": setting.group,
        "grad_accum": 1,
        "micro_batch_tokens": setting.forward_tokens,
        "lp_micro_batch": setting.rows_per_step,
        "max_steps": setting.num_steps + 1,
        "refresh_every": 0,
    }
    arguments = [part for key, value in (flags | keys).items() for part in (f"--{key}", str(value))]
    run = open_run("", arguments)
    student = make_student(run, setting)
    if not setting.shares:
        student = replace(student, unshared_because="this measures rows alone")
    training = steps.prepare(run, student)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    weights = _weights_gib(device)
    clocks = [time.perf_counter()]
    batches = feed.global_batches(run, student, snapshot, pool, range(setting.num_steps + 1), training.caps)
    for batch in islice(batches, setting.num_steps):
        steps.train_step(run, training, pool, batch)
        synchronize(device)
        clocks.append(time.perf_counter())
    timed_steps = [record for record in metrics.read(run.metrics.path) if record["kind"] == "step"][WARM_UP:]
    waited, above = [step["read_wait_seconds"] for step in timed_steps], _gib_above(weights, device)
    last = next(batches)

    def one_more() -> None:
        steps.train_step(run, training, pool, last)
        synchronize(device)

    events = parts.profiled(one_more, device)
    profile = parts.Profile(events, parts.least_weights(student.base.get_decoder()), len(last.forwards))
    return Steps(between(clocks), waited, above, student.padded_because, profile)


def between(clocks: list[float]) -> list[float]:
    """Seconds of each step but the warm-up's, from the clocks before the first and after every step."""
    return [after - before for before, after in pairwise(clocks)][WARM_UP:]


# --- TRL ---


def trl_sft(setting: Setting, device: str, folder: Path, keys: dict[str, str]) -> Steps:
    """Plain cross-entropy on the same completions: TRL's SFTTrainer with Liger and the same adapters.

    Packed rows where flash-attn is installed are what it does best; without, it attends under a mask over the
    whole row, and padded batches are there as a second cell.
    """
    import datasets
    import trl
    from peft import LoraConfig
    from transformers import TrainerCallback

    flash = "flash_attention_2" if version("flash-attn") else "sdpa"
    model = base_model(setting, device)
    model.set_attn_implementation(flash)
    records = cache.open(folder / "cache")[:]
    columns = {
        "input_ids": [[*r.prompt_ids.tolist(), *r.completion_ids.tolist()] for r in records],
        "completion_mask": [[0] * len(r.prompt_ids) + [1] * len(r.completion_ids) for r in records],
    }
    clocks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            clocks.append(time.perf_counter())

    mean_tokens = sum(map(len, columns["input_ids"])) / len(records)
    accumulation = max(1, round(setting.rows_per_step * mean_tokens / setting.forward_tokens))
    packing = keys["packing"] == "on"
    rows_per_forward = 1 if packing else setting.rows_per_step // accumulation
    lora = LoraConfig(
        r=setting.lora_r, lora_alpha=2 * setting.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=sft_arguments(setting, device, folder, rows_per_forward, accumulation, packing),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=_tokenizer(),
        peft_config=lora,
        callbacks=[Clock()],
    )
    weights = _weights_gib(device)
    started = time.perf_counter()
    trainer.train()
    # Its steps have nearly as many tokens as ours: count the time of equally many.
    row_tokens = sum(len(row) for row in trainer.train_dataset["input_ids"]) / len(trainer.train_dataset)
    scale = setting.rows_per_step * mean_tokens / (accumulation * rows_per_forward * row_tokens)
    seconds = [scale * step for step in between([started, *clocks])]
    return Steps(seconds, [], _gib_above(weights, device), f"attention {flash}")


def sft_arguments(
    setting: Setting, device: str, folder: Path, rows_per_forward: int, accumulation: int, packing: bool
) -> Any:
    import trl

    return trl.SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=setting.num_steps,
        per_device_train_batch_size=rows_per_forward,
        gradient_accumulation_steps=accumulation,
        max_length=setting.forward_tokens,
        packing=packing,
        use_liger_kernel=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=setting.dtype == "bf16",
        use_cpu=device == "cpu",
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        completion_only_loss=True,
        num_train_epochs=100,
    )


def _tokenizer() -> Any:
    """Rows are tokens already; the trainer only wants to know its pad and EOS ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


# --- cells ---

Contender = Callable[[Setting, str, Path, dict[str, str]], Steps]
CELLS: dict[str, tuple[Contender, dict[str, str]]] = {
    "packed": (ours, {}),
    "uncompiled": (ours, {"compile": "false"}),
    "padded": (ours, {"packing": "off"}),
    "trl_sft": (trl_sft, {"packing": "on"}),
    "trl_sft_padded": (trl_sft, {"packing": "off"}),
}


GROUPED = {
    f"{kind}/{prompt}": (kind == "shared", prompt) for prompt in (1024, 256) for kind in ("shared", "alone")
}
"""Cells with groups of four rows: whether they share prompts, and the prompts' tokens."""


def cells(tiny: bool) -> list[Cell]:
    setting = TINY if tiny else REAL
    found = dict.fromkeys(CELLS, setting)
    for name, (shares, prompt) in GROUPED.items():
        tokens = prompt // 64 if tiny else prompt
        found[name] = replace(
            setting,
            prompt_tokens=(tokens, tokens + 1),
            rows_per_step=8 if tiny else 48,
            group=4,
            shares=shares,
        )
    return [Cell(name, partial(measure, name, own), SOURCES, PACKAGES) for name, own in found.items()]


def measure(name: str, setting: Setting, bench: Bench) -> Record:
    """The figures of a cell; raises what the contender raises."""
    contender, keys = CELLS.get(name, CELLS["packed"])
    rows: Rows = bench.make(f"rows/{setting.group}/{setting.prompt_tokens}", lambda: Rows(setting))
    timed_steps = contender(setting, bench.device, rows.folder, keys | {"run_name": name.replace("/", "-")})
    rate, seconds = (
        bench.ceilings["product_tflops"] * 1e12,
        sum(timed_steps.seconds) / len(timed_steps.seconds),
    )
    num_tokens = rows.tokens_per_step
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": num_tokens / seconds,
        "rows_per_second": setting.rows_per_step / seconds,
        "mfu": flops_per_step(setting, num_tokens) / seconds / rate,
        "wait_share": sum(timed_steps.waited) / sum(timed_steps.seconds) if timed_steps.waited else None,
        "gib_above_weights": timed_steps.gib_above_weights,
        "tokens_per_step": num_tokens,
        "note": timed_steps.note,
        "parts": timed_steps.profile.parts(num_tokens, seconds, rate) if timed_steps.profile else None,
    }


class Rows:
    """The synthetic cache of two steps, in `folder`/cache as long as this lives."""

    def __init__(self, setting: Setting) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name)
        write_rows(setting, self.folder / "cache")
        lengths = cache.open(self.folder / "cache").index.to_pylist()
        self.tokens_per_step = (
            sum(row["num_prompt_tokens"] + row["num_completion_tokens"] for row in lengths) / 2
        )


def _weights_gib(device: str) -> float | None:
    """What the weights hold; from here on the peak is counted."""
    release(device)
    reset_peak(device)
    return peak_gib(device)


def _gib_above(weights: float | None, device: str) -> float | None:
    peak = peak_gib(device)
    return None if peak is None or weights is None else peak - weights


def flops_per_step(setting: Setting, num_tokens: float) -> float:
    """Of the frozen weights' forward and backward by inputs, and of the head at the scored positions."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(setting.model)
    frozen = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "embed_tokens" not in name and "lm_head" not in name
    )
    scored = setting.rows_per_step * setting.completion_tokens
    return 4 * frozen * num_tokens + 4 * setting.model.vocab_size * setting.model.hidden_size * scored


def table(found: Found) -> str:
    """Markdown: a line a cell, and tokens a second over TRL's on the same device."""
    rows = []
    for device, here in found.items():
        measured = {name: record for name, record in here.items() if name in CELLS or name in GROUPED}
        trl = max(
            (r.get("tokens_per_second", 0) for name, r in measured.items() if name.startswith("trl")),
            default=0,
        )
        for name, record in measured.items():
            if record["status"] != "ok":
                rows.append([device, name, record["status"], "", "", "", ""])
                continue
            rate, wait, memory = (
                record[key] for key in ("tokens_per_second", "wait_share", "gib_above_weights")
            )
            rows.append(
                [
                    device,
                    name,
                    f"{rate:,.0f}",
                    f"{rate / trl:.2f}" if trl else "",
                    f"{record['mfu']:.1%}",
                    "" if wait is None else f"{wait:.2%}",
                    "" if memory is None else f"{memory:.1f}",
                ]
            )
    return markdown(
        ["device", "cell", "tokens/s", "× TRL's best", "MFU", "waiting", "GiB above weights"], rows
    )


PROGRAM = Program(__doc__ or "", "stage_two.json", lambda options: cells(options.tiny), table, minutes=8.0)

if __name__ == "__main__":
    PROGRAM.main()
