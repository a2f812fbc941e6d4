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

`rollouts_per_second`: generated and scored. TRL's time for it is that of generation and of the teacher's
backbone, without the teacher's head or the divergence. `tokens_per_second`: completion tokens distilled, over
the time of the whole step.
"""

from __future__ import annotations

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
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cache
from bench import stage_one_teacher, stage_two
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
)
OURS = ("stages/**/*.py", "cache/*.py", "dualkl/**/*.py")
TRL_WARM_UP = 1  # steps
OUR_WARM_UP = 2  # steps of stage two


@dataclass(frozen=True)
class Setting:
    """Student and optimizer step as in `stage_two`, the teacher's shape and size, and the amounts."""

    student: stage_two.Setting
    teacher: str
    teacher_size: stage_one_teacher.Size
    num_prompt_tokens: int
    rows_per_unit: int
    num_warm_up_rows: int
    trl_steps: int = 2
    trl_batches: tuple[int, ...] = (128, 64, 32)

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
        "group_size": 1,
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
    prompts = [
        Prompt(f"p{i}", ids.astype(np.int32), " ".join(map(word_of, ids)), {})
        for i, ids in enumerate(prompts_of(setting, run.config.refresh.rollouts_per_refresh))
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


def measure_stage_one(setting: Setting, bench: Bench) -> Record:
    done: StageOne = bench.make("stage one", lambda: stage_one(setting, bench.device))
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


def measure_both(setting: Setting, bench: Bench) -> Record:
    """On the rows of `ours/stage_one` where this call has measured that."""
    found = measure_stage_one(setting, bench)
    done: StageOne = bench.made["stage one"]
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


def measure_trl(setting: Setting, batch: int, cache_implementation: str | None, bench: Bench) -> Record:
    """Seconds of TRL's steps after the first, and of their parts."""
    bench.clear()
    reset_peak(bench.device)
    timed_steps: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            trl_trainer(setting, batch, cache_implementation, bench.device, Path(folder), timed_steps).train()
        finally:
            forget_accelerate()
    measured = timed_steps[TRL_WARM_UP:]
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
        "peak_gib": peak_gib(bench.device),
        "num_rollouts": batch * len(measured),
        "steps": timed_steps,
    }


def trl_trainer(
    setting: Setting,
    batch: int,
    cache_implementation: str | None,
    device: str,
    folder: Path,
    timed_steps: list[dict[str, float]],
) -> Any:
    """A trainer that appends to `steps` the seconds of each: `generate`, the `teacher`'s forward, and the
    `whole`.
    """
    import datasets
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DistillationTrainer

    seconds: dict[str, float] = defaultdict(float)
    clocks: list[float] = []
    num_steps, num_tokens = TRL_WARM_UP + setting.trl_steps, setting.student.completion_tokens

    class Timed(DistillationTrainer):
        def _generate_single_turn(self, *arguments: Any, **keywords: Any) -> Any:
            with timed(seconds, "generate", device):
                completions = super()._generate_single_turn(*arguments, **keywords)
            assert {len(ids) for ids in completions} == {num_tokens}
            return completions

        def _get_last_hidden_state(self, *arguments: Any, **keywords: Any) -> Any:
            if torch.is_grad_enabled():  # the student's
                return super()._get_last_hidden_state(*arguments, **keywords)
            with timed(seconds, "teacher", device):
                return super()._get_last_hidden_state(*arguments, **keywords)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            clocks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            clocks.append(time.perf_counter())
            timed_steps.append(dict(seconds) | {"whole": clocks[-1] - clocks[-2]})
            seconds.clear()
            say(
                f"step {len(timed_steps)}: "
                + ", ".join(f"{name} {value:.1f} s" for name, value in timed_steps[-1].items())
            )

    model = stage_two.base_model(setting.student, device)
    model.generation_config = GenerationConfig(pad_token_id=0)
    texts = [" ".join(map(word_of, ids)) for ids in prompts_of(setting, batch * num_steps).tolist()]
    rank = setting.student.lora_r
    return Timed(
        model=model,
        teacher_model=teacher_model(setting, device),
        args=trl_arguments(setting, batch, cache_implementation, device, folder),
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer_of(setting.vocab_size),
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )


def trl_arguments(
    setting: Setting, batch: int, cache_implementation: str | None, device: str, folder: Path
) -> Any:
    from trl import DistillationConfig

    return DistillationConfig(
        output_dir=str(folder),
        max_steps=TRL_WARM_UP + setting.trl_steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        max_completion_length=setting.student.completion_tokens,
        cache_implementation=cache_implementation,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=setting.student.dtype == "bf16",
        use_cpu=device == "cpu",
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def forget_accelerate() -> None:
    """A trainer sets accelerate's process-wide state, which the next cell would find."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# --- cells ---


def cells(tiny: bool) -> list[Cell]:
    setting = TINY if tiny else REAL
    largest = max(setting.trl_batches)
    contenders = {str(batch): (batch, None) for batch in setting.trl_batches} | {
        f"{largest}/static": (largest, "static")
    }
    peers = ("transformers", "peft", "trl")
    return [
        Cell(
            "ours/stage_one", partial(measure_stage_one, setting), (*SOURCES, *OURS), ("transformers", "peft")
        ),
        Cell("ours/both", partial(measure_both, setting), (*SOURCES, *OURS), ("transformers", "peft")),
        *(
            Cell(f"trl/{name}", partial(measure_trl, setting, batch, kind), SOURCES, peers)
            for name, (batch, kind) in contenders.items()
        ),
    ]


RATES = {"rollouts_per_second": "rollouts/s scored", "tokens_per_second": "tokens/s distilled"}


def table(found: Found) -> str:
    """Markdown: a line a cell; beside each rate its ratio to TRL's best on the same device."""
    header = ["device", "cell", *(text for name in RATES.values() for text in (name, "× TRL's best"))]
    rows = [
        [device, name, *_rates(record, measured)]
        for device, measured in found.items()
        for name, record in measured.items()
        if name != "ceilings"
    ]
    return markdown(header, rows)


def _rates(record: Record, measured: dict[str, Record]) -> list[str]:
    if record["status"] != "ok":
        return [record["status"], "", "", ""]
    texts = []
    for rate in RATES:
        best = max(
            (other.get(rate, 0.0) for name, other in measured.items() if name.startswith("trl/")), default=0.0
        )
        own = record.get(rate)
        texts += [number(own, 1), number(own / best if own and best else None, 2)]
    return texts


PROGRAM = Program(__doc__ or "", "online.json", lambda options: cells(options.tiny), table, minutes=2.5)

if __name__ == "__main__":
    PROGRAM.main()
