"""Both stages against TRL's online distillation: 1.7B-shaped student, 8B-shaped teacher, equal rollouts, one
GPU.

    python bench/online.py                              every cell; none begins after 2.5 minutes
    python bench/online.py --only 'ours/*' trl/128      some of them
    python bench/online.py --table                      rates, and ratios to TRL's best batch

Random prompts of 128 tokens, completions of exactly 256 (no model has the EOS id), temperature 1, LoRA r 64
on all linear layers, gradient checkpointing, 128 rollouts per optimizer step, seeded random weights.

ours/stage_one   `collect` (generation, scoring by a plain teacher, encoding, writing to a cache) with batch
                 sizes `auto`: 2 units of 1,024 rollouts after one of 512 to warm up.
ours/both        the same, then one pass over the rows by the run's own reader and `train_step` (16 steps of
                 128 after two to warm up). Opening the cache counts, loading models does not.
trl/B            TRL's DistillationTrainer with B rollouts per step: transformers' generate, reverse KL over
                 the full vocabulary; two steps after one to warm up. GKDTrainer refers to it at on-policy
                 share 1 and temperature 1, itself generates without a cache under gradient checkpointing, and
                 holds full logits.
trl/128/static   the same with generate's static cache, which TRL does not compile.
trl/vllm         the same with vLLM in TRL's process, in a process of its own. --vllm names the folder that
                 vLLM was unpacked into, if it is not installed.
*/group, */long  four completions of each prompt on both sides; the same with prompts of 1,024 tokens and 512
                 new ones.

`rollouts_per_second`: generated and scored. TRL's time for it is that of generation and of the teacher's
backbone, without the teacher's head or the divergence. `tokens_per_second`: completion tokens distilled, over
the time of the whole step.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cache
from bench import stage_one_teacher, stage_two, trl_peer
from bench.cells import Bench, Cell, Program
from bench.measuring import Found, Record, markdown, number, peak_gib, release, reset_peak, synchronize
from stages.data.prompts import Prompt
from stages.engine.opening import open_engine
from stages.loops import feed, schedule, setup, steps
from stages.loops.collect import collect
from stages.loops.refresh import planned_units
from stages.models import teacher as teachers
from stages.models.student import Student
from stages.models.teacher import Teacher
from stages.runtime import metrics
from stages.runtime.checkpoint import Position
from stages.runtime.run import Run, open_run

SOURCES = (
    "bench/cells.py",
    "bench/measuring.py",
    "bench/online.py",
    "bench/stage_two.py",
    "bench/stage_one_teacher.py",
    "bench/trl_peer.py",
)
OURS = ("stages/**/*.py", "cache/*.py", "dualkl/**/*.py")
TRL_WARM_UP = 1  # steps
OUR_WARM_UP = 2  # steps of stage two


@dataclass(frozen=True)
class Setting:
    """Student, group and optimizer step as in `stage_two`, the teacher's shape and size, and the amounts."""

    student: stage_two.Setting
    teacher: str
    teacher_size: stage_one_teacher.Size
    num_prompt_tokens: int
    rows_per_unit: int
    num_warm_up_rows: int
    trl_steps: int = 2
    trl_batches: tuple[int, ...] = (128, 64, 32)
    trl_accumulation: int = 1  # forwards of a step

    @property
    def num_rows(self) -> int:
        return self.student.rows_per_step * self.student.num_steps

    @property
    def vocab_size(self) -> int:
        return self.student.model.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.student.dtype == "bf16" else torch.float32


REAL = Setting(
    replace(
        stage_two.REAL,
        completion_tokens=256,
        rows_per_step=128,
        num_steps=16,
        model=Qwen3Config(
            vocab_size=151_936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
        ),
    ),
    "8B",
    stage_one_teacher.FULL,
    num_prompt_tokens=128,
    rows_per_unit=1024,
    num_warm_up_rows=512,
)
TINY = Setting(
    replace(stage_two.TINY, rows_per_step=4, num_steps=2),
    "tiny",
    stage_one_teacher.TINY,
    num_prompt_tokens=6,
    rows_per_unit=4,
    num_warm_up_rows=4,
    trl_steps=1,
    trl_batches=(4, 2),
)


# --- what both sides share ---


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for each id, so that prompts have known lengths; pad is id 0, EOS one more id that the models do
    not have.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word_of(i): i for i in range(vocab_size + 1)}, unk_token=word_of(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=word_of(0), eos_token=word_of(vocab_size), padding_side="left"
    )


def word_of(token: int) -> str:
    return f"w{token}"


def prompts_of(setting: Setting, count: int) -> np.ndarray:
    """Ids [count, num_prompt_tokens], none of them the pad."""
    return np.random.default_rng(0).integers(1, setting.vocab_size, (count, setting.num_prompt_tokens))


def teacher_model(setting: Setting, device: str) -> Any:
    return stage_one_teacher.make_teacher_model(setting.teacher, setting.teacher_size, device, setting.dtype)


@contextmanager
def timed(seconds: dict[str, float], name: str, device: str) -> Iterator[None]:
    """Adds the time of the block, begun and ended on an idle device, to `seconds[name]`."""
    synchronize(device)
    started = time.perf_counter()
    yield
    synchronize(device)
    seconds[name] += time.perf_counter() - started


def say(text: str) -> None:
    print(f"        {time.strftime('%H:%M:%S')}  {text}", flush=True)


# --- ours ---


def open_ours(setting: Setting, device: str, folder: Path, name: str, num_rows: int) -> Run:
    """`auto` batch sizes ask for the teacher's config.json, which is written here."""
    student = setting.student
    stage_one_teacher.teacher_config(setting.teacher, setting.teacher_size).save_pretrained(
        folder / "teacher"
    )
    flags = {
        "run_name": name,
        "runs_dir": folder,
        "device": device,
        "dtype": student.dtype,
        "lora_r": student.lora_r,
        "student_model": "bench",
        "teacher_model": folder / "teacher",
        "teacher_ds_zero3": False,
        "group_size": student.group,
        "max_prompt_tokens": setting.num_prompt_tokens,
        "max_new_tokens": student.completion_tokens,
        "rollouts_per_unit": min(setting.rows_per_unit, num_rows),
        "rollouts_per_refresh": num_rows,
        "signal_k": student.k,
        "batch_size": student.rows_per_step,
        "grad_accum": 1,
        "max_steps": student.num_steps,
        "refresh_every": 0,
    }
    return open_run("", [part for key, value in flags.items() for part in (f"--{key}", str(value))])


def student_of(run: Run, setting: Setting) -> Student:
    student = stage_two.make_student(run, setting.student)
    return replace(student, tokenizer=tokenizer_of(setting.vocab_size), eos_ids=(setting.vocab_size,))


def write_rows(run: Run, setting: Setting, student: Student, teacher: Teacher) -> None:
    """Stage one: the rollouts of the run's first refresh, scored, on disk."""
    num_prompts = run.config.refresh.rollouts_per_refresh // setting.student.group
    prompts = [
        Prompt(f"p{i}", ids.astype(np.int32), " ".join(map(word_of, ids)), {})
        for i, ids in enumerate(prompts_of(setting, num_prompts))
    ]
    signal = {"kind": "topk", "k": setting.student.k, "temperature": 1.0}
    fingerprint = cache.Fingerprint({"vocab_size": setting.vocab_size, "signal": signal})
    policy = setup.student_policy(run, student, open_engine(student.model), 0)
    units = planned_units(run, policy, prompts, 0)
    with cache.Writer(run.config.cache_root, fingerprint) as writer:
        collect(run, units, policy, lambda: teacher, writer, run.config.teacher_signal)


@dataclass(frozen=True)
class StageOne:
    """A run whose rows are on disk, in a folder that lives as long as this; its student; seconds spent."""

    folder: tempfile.TemporaryDirectory
    run: Run
    student: Student
    seconds: float
    peak_gib: float | None


def stage_one(setting: Setting, device: str) -> StageOne:
    folder = tempfile.TemporaryDirectory()
    seconds: dict[str, float] = defaultdict(float)
    reset_peak(device)
    warm_up = open_ours(setting, device, Path(folder.name), "warm-up", setting.num_warm_up_rows)
    run = open_ours(setting, device, Path(folder.name), "run", setting.num_rows)
    student = student_of(run, setting)
    teacher = teachers.plain_teacher(teacher_model(setting, device), run.world, run.config.train.packing)
    write_rows(warm_up, setting, student, teacher)
    say("stage one is warm")
    with timed(seconds, "stage one", device):
        write_rows(run, setting, student, teacher)
    say(f"stage one: {seconds['stage one']:.1f} s")
    teacher.close()
    release(device)
    lengths = {row["num_completion_tokens"] for row in cache.open(run.config.cache_root).index.to_pylist()}
    assert lengths == {setting.student.completion_tokens}
    return StageOne(folder, run, student, seconds["stage one"], peak_gib(device))


def measure_stage_one(setting: Setting, kind: str, bench: Bench) -> Record:
    done: StageOne = bench.make(f"stage one{kind}", lambda: stage_one(setting, bench.device))
    return {
        "rollouts_per_second": setting.num_rows / done.seconds,
        "stage_one_seconds": done.seconds,
        "num_rollouts": setting.num_rows,
        **shares_of(done.run),
        "stage_one_peak_gib": done.peak_gib,
    }


def train(run: Run, training: steps.Training, num_steps: int) -> None:
    """Stage two: that many steps over the run's rows."""
    pool, snapshot = schedule.open_pool(run, Position(0, 0))
    with closing(
        feed.global_batches(run, training.student, snapshot, pool, range(num_steps), training.caps)
    ) as batches:
        for batch in batches:
            steps.train_step(run, training, pool, batch)


def measure_both(setting: Setting, kind: str, bench: Bench) -> Record:
    """On the rows of `ours/stage_one` where this call has measured that."""
    found = measure_stage_one(setting, kind, bench)
    done: StageOne = bench.made[f"stage one{kind}"]
    seconds: dict[str, float] = defaultdict(float)
    reset_peak(bench.device)
    training = steps.prepare(done.run, done.student)
    train(done.run, training, OUR_WARM_UP)
    with timed(seconds, "stage two", bench.device):
        train(done.run, training, setting.student.num_steps)
    say(f"stage two: {seconds['stage two']:.1f} s")
    tokens = setting.num_rows * setting.student.completion_tokens
    return found | {
        "tokens_per_second": tokens / (done.seconds + seconds["stage two"]),
        "stage_two_seconds": seconds["stage two"],
        "stage_two_peak_gib": peak_gib(bench.device),
    }


def shares_of(run: Run) -> Record:
    """Rates and shares of stage one's parts, as the run itself notes them."""
    last = [record for record in metrics.read(run.metrics.path) if record["kind"] == "rollout_progress"][-1]
    names = (
        "generated_tokens_per_second",
        "scored_tokens_per_second",
        "share_generate",
        "share_score",
        "share_write",
    )
    return {name: last[name] for name in names}


# --- TRL ---


def measure_trl(setting: Setting, batch: int, generation: str, bench: Bench) -> Record:
    """Seconds of TRL's steps after the first, and of their parts."""
    bench.clear()
    try:
        return trl_steps(setting, batch, generation, bench.device)
    finally:
        forget_accelerate()


def measure_with_vllm(setting: Setting, batch: int, vllm: Path | None, bench: Bench) -> Record:
    """The same in a process of its own: the engine joins torch.distributed and keeps its memory."""
    bench.clear()
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder) / "asked.pickle", Path(folder) / "found.json"
        asked.write_bytes(pickle.dumps((setting, batch, bench.device, str(found))))
        script = "import pickle, sys; from bench import online; "
        script += "online.write_vllm_steps(*pickle.load(open(sys.argv[1], 'rb')))"
        trl_peer.run_with_vllm(["-c", script, str(asked)], vllm)
        record: Record = json.loads(found.read_text())
        return record


def write_vllm_steps(setting: Setting, batch: int, device: str, path: str) -> None:
    """What the process with vLLM does."""
    Path(path).write_text(json.dumps(trl_steps(setting, batch, "vllm", device)))


def trl_steps(setting: Setting, batch: int, generation: str, device: str) -> Record:
    """`generation`: "dynamic" or "static", transformers' caches; "vllm"."""
    reset_peak(device)
    clock = StepClock(device)
    with tempfile.TemporaryDirectory() as folder:
        trl_trainer(setting, batch, generation, device, Path(folder), clock).train()
    measured = clock.steps[TRL_WARM_UP:]
    assert len(measured) == setting.trl_steps
    mean = {
        name: sum(step[name] for step in measured) / len(measured)
        for name in ("generate", "teacher", "whole")
    }
    return {
        "rollouts_per_second": batch / (mean["generate"] + mean["teacher"]),
        "tokens_per_second": batch * setting.student.completion_tokens / mean["whole"],
        "generate_seconds": mean["generate"],
        "teacher_seconds": mean["teacher"],
        "step_seconds": mean["whole"],
        "peak_gib": peak_gib(device),
        "num_rollouts": batch * len(measured),
        "steps": clock.steps,
    }


class StepClock(TrainerCallback):
    """Seconds of each step: `generate`, the `teacher`'s forward, and the `whole`."""

    def __init__(self, device: str) -> None:
        self.device, self.steps = device, list[dict[str, float]]()
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        self.last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.steps.append(dict(self.seconds) | {"whole": now - self.last})
        self.seconds.clear()
        self.last = now
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in self.steps[-1].items())
        say(f"step {len(self.steps)}: {parts}")


def trl_trainer(
    setting: Setting, batch: int, generation: str, device: str, folder: Path, clock: StepClock
) -> Any:
    model = stage_two.base_model(setting.student, device)
    model.generation_config = GenerationConfig(pad_token_id=0)
    tokenizer = tokenizer_of(setting.vocab_size)
    if generation == "vllm":
        prepare_vllm(model, tokenizer, folder / "student")
    num_steps, group = TRL_WARM_UP + setting.trl_steps, setting.student.group
    ids = prompts_of(setting, batch * num_steps // group).repeat(group, 0)

    def check(lengths: list[int]) -> None:
        assert set(lengths) == {setting.student.completion_tokens}

    rank = setting.student.lora_r
    return trl_peer.distillation_trainer(
        lambda name: timed(clock.seconds, name, device),
        on_tokens=check,
        model=model,
        teacher_model=teacher_model(setting, device),
        arguments=trl_arguments(setting, batch, generation, device, folder),
        prompts=[" ".join(map(word_of, row)) for row in ids.tolist()],
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )


def prepare_vllm(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """vLLM reads configuration and tokenizer from a folder; the first weight sync brings the weights."""
    import trl.generation.vllm_generation as generation

    generation.LLM = partial(generation.LLM, load_format="dummy")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.name_or_path = str(folder)


def trl_arguments(setting: Setting, batch: int, generation: str, device: str, folder: Path) -> Record:
    num_tokens = setting.student.completion_tokens
    vllm = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": setting.num_prompt_tokens + num_tokens,
        "generation_kwargs": {"ignore_eos": True, "detokenize": False},
    }
    return {
        "output_dir": str(folder),
        "max_steps": TRL_WARM_UP + setting.trl_steps,
        "per_device_train_batch_size": batch // setting.trl_accumulation,
        "gradient_accumulation_steps": setting.trl_accumulation,
        "max_completion_length": num_tokens,
        "shuffle_dataset": False,
        "cache_implementation": "static" if generation == "static" else None,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": setting.student.dtype == "bf16",
        "use_cpu": device == "cpu",
        "learning_rate": 1e-4,
        "optim": "adamw_torch_fused",
        **(vllm if generation == "vllm" else {}),
    }


def forget_accelerate() -> None:
    """A trainer sets accelerate's process-wide state, which the next cell would find."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# --- cells ---


def with_group(setting: Setting, group: int) -> Setting:
    """The setting with that many completions of each prompt."""
    return replace(setting, student=replace(setting.student, group=group))


def with_lengths(setting: Setting, prompt: int, completion: int) -> Setting:
    """The setting with longer texts, fewer of them, and TRL's step in several forwards."""
    student = replace(
        setting.student, completion_tokens=completion, num_steps=min(4, setting.student.num_steps)
    )
    return replace(setting, student=student, num_prompt_tokens=prompt, trl_accumulation=4)


def cells(tiny: bool, vllm: Path | None = None) -> list[Cell]:
    setting = TINY if tiny else REAL
    largest = max(setting.trl_batches)
    contenders = {str(batch): (batch, "dynamic") for batch in setting.trl_batches} | {
        f"{largest}/static": (largest, "static")
    }
    group = with_group(setting, 4)
    long = with_lengths(group, *((8, 16) if tiny else (1024, 512)))
    grouped = {"": setting, "/group": group, "/long": long}
    peers = ("transformers", "peft", "trl")
    ours = {"stage_one": measure_stage_one, "both": measure_both}
    return [
        *(
            Cell(
                f"ours/{name}{kind}",
                partial(measure, own, kind),
                (*SOURCES, *OURS),
                ("transformers", "peft"),
            )
            for kind, own in grouped.items()
            for name, measure in ours.items()
        ),
        *(
            Cell(f"trl/{name}", partial(measure_trl, setting, batch, kind), SOURCES, peers)
            for name, (batch, kind) in contenders.items()
        ),
        *(
            Cell(f"trl/vllm{kind}", partial(measure_with_vllm, own, largest, vllm), SOURCES, peers)
            for kind, own in grouped.items()
        ),
    ]


RATES = {"rollouts_per_second": "rollouts/s scored", "tokens_per_second": "tokens/s distilled"}


def table(found: Found) -> str:
    """Markdown: a line a cell; beside each rate its ratio to TRL's best on the same device."""
    header = ["device", "cell", *(text for name in RATES.values() for text in (name, "× TRL's best"))]
    rows = [
        [device, name, *_rates(name, record, measured)]
        for device, measured in found.items()
        for name, record in measured.items()
        if name != "ceilings"
    ]
    return markdown(header, rows)


def _kind(name: str) -> str:
    """Whether a cell has groups or longer texts; ratios are between cells of one kind."""
    return last if (last := name.split("/")[-1]) in ("group", "long") else ""


def _rates(name: str, record: Record, measured: dict[str, Record]) -> list[str]:
    if record["status"] != "ok":
        return [record["status"], "", "", ""]
    texts = []
    peers = [r for peer, r in measured.items() if peer.startswith("trl/") and _kind(peer) == _kind(name)]
    for rate in RATES:
        best = max((other.get(rate, 0.0) for other in peers), default=0.0)
        own = record.get(rate)
        texts += [number(own, 1), number(own / best if own and best else None, 2)]
    return texts


PROGRAM = Program(
    __doc__ or "",
    "online.json",
    lambda options: cells(options.tiny, options.vllm and options.vllm.resolve()),
    table,
    minutes=2.5,
    add_options=trl_peer.add_vllm,
)

if __name__ == "__main__":
    PROGRAM.main()
