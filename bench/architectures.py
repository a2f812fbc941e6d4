"""Both stages on a tiny random model of every causal language model type that transformers knows.

    python -m bench.architectures                     types without a result for these versions; 30 minutes
    python -m bench.architectures --only qwen3 gpt2   these types
    python -m bench.architectures --again             types that have a result, too

Each type runs twice as a user would run it, in fp32 on the CPU. First packed as `packing: auto` decides, with
the student as its own teacher, so the first loss is 0. Then padded, with a random LoRA adapter and another
teacher. Every log-probability that the project computes (rollout engine, teacher, student in training) is
compared with transformers' own forward of each row alone, unpadded, in the type's default attention. Results
are kept in bench/results/architectures.json, from which docs/models.md is written.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import cache
import stages.rollout
import stages.train
from bench import tiny_types
from bench.models_page import COMMON, page
from stages.loops import probe
from stages.models.student import Student
from stages.runtime.errors import UserError
from stages.runtime.run import Run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "models.md"
TOKENIZER = "examples/arithmetic/student"
EXACT = 1e-4  # nats: fp32 against fp32
STEPS = 5e-4  # nats: transformers' cached steps against its own forward, for models with a recurrent state
SAME = 1e-5  # the loss where teacher and student are one model
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
TIES = 0.03  # share of tokens
SECONDS_A_TYPE, TYPES_A_WORKER = 600, 100
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "fp32",
    "teacher_dtype": "fp32",
    "teacher_ds_zero3": "false",
    "compile": "false",
    "rollouts_per_refresh": 8,
    "rollouts_per_unit": 8,
    "batch_size": 8,
    "num_prompts": 8,
    "max_new_tokens": 16,
    "max_steps": 1,
    "warmup_steps": 0,
    "lr": 1e-4,
    "refresh_every": 0,
    "checkpoint_every": 100,
    "lora_r": 4,
    "lora_alpha": 8,
    "signal_k": 32,
    "gen_micro_batch": 8,
    "eval_prompts": 8,
}


# --- one run, judged ---


class Refused(Exception):
    """The sentence of a refusal."""


@dataclass
class Found:
    """What is wrong (sentences), and the gaps measured (nats)."""

    wrong: list[str] = field(default_factory=list)
    gaps: dict[str, float] = field(default_factory=dict)
    by_generate: bool = False
    padded_because: str = ""
    share_off: float = 0.0

    def compare(self, what: str, found: np.ndarray, expected: np.ndarray, within: float = EXACT) -> None:
        gaps = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
        self.gaps[what] = float(f"{gaps.max():.2g}")
        off = ~(gaps <= within)  # NaN too
        self.share_off = max(self.share_off, float(off.mean()) if len(off) > 1 else 0.0)
        if off.any():
            mean = float(np.mean(expected, dtype=np.float64))
            self.wrong.append(
                f"{what}: off by {gaps.max():.2g}, {off.sum()} of {len(off)} tokens, whose mean is {mean:.2f}"
            )


@dataclass(frozen=True)
class Models:
    """Folders of a run's models; `adapter` may be empty."""

    student: Path
    teacher: Path
    adapter: Path | None = None


def flags(run: Path, models: Models, **values: Any) -> list[str]:
    keys = SETTINGS | {
        "student_model": models.student,
        "teacher_model": models.teacher,
        "runs_dir": run.parent,
    }
    keys |= {"run_name": run.name, "student_adapter": models.adapter or ""} | values
    return [
        "--config",
        "pipeline.yaml",
        *(part for key, value in keys.items() for part in (f"--{key}", str(value))),
    ]


def stage(main: Callable[[], None], arguments: list[str]) -> None:
    """Runs a stage's `main` in this process, silently. `Refused` with its sentence where it refuses."""
    unread, argv = io.StringIO(), sys.argv
    sys.argv = ["stages", *arguments]
    try:
        with contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
            main()
    except (UserError, cache.CacheError) as error:
        raise Refused(" ".join(str(error).split())) from error
    finally:
        sys.argv = argv


@torch.no_grad()
def reference_logprobs(
    folder: Path, rows: list[cache.Record], vocabulary: int, adapter: Path | None = None
) -> np.ndarray:
    """Log-probability of every completion token by transformers alone: each row by itself, unpadded, without
    a cache.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    return np.concatenate(
        [row_logprobs(model, row.prompt_ids, row.completion_ids, vocabulary) for row in rows]
    )


def row_logprobs(model: Any, prompt: np.ndarray, completion: np.ndarray, vocabulary: int) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :vocabulary]
    tokens = torch.from_numpy(completion.astype(np.int64))[:, None]
    return logits.float().log_softmax(-1).gather(1, tokens)[:, 0].numpy()


def judge(found: Found, run: Path, models: Models, name: str, **values: Any) -> None:
    """Both stages on `models`: `found` gets what differs from transformers, and by which ways it was
    computed.
    """
    arguments = flags(run, models, **values)
    with watched() as watch:
        stage(stages.rollout.main, arguments)
        found.by_generate |= watch.generate_calls > 0
        rows = rows_of(run)
        watch.rows = rows
        stage(stages.train.main, arguments)
    if "packing" not in values:
        found.padded_because = watch.padded_because
    vocabulary = cache.open(str(run / "cache")).fingerprint.must_match["vocab_size"]
    expected = reference_logprobs(models.student, rows, vocabulary, models.adapter)
    teacher = expected
    if models.teacher != models.student or models.adapter:
        teacher = reference_logprobs(models.teacher, rows, vocabulary)
    written, within = (
        np.concatenate([row.behaviour_logprobs for row in rows]),
        STEPS if found.by_generate else EXACT,
    )
    found.compare(f"{name}: behaviour", written, expected, within)
    found.compare(f"{name}: teacher", np.concatenate([row.teacher_logprobs for row in rows]), teacher)
    found.compare(f"{name}: student without gradients", watch.logprobs, expected)
    step = next(record for record in _records(run) if record["kind"] == "step")
    found.compare(
        f"{name}: student in training", np.array([step["student_logprob"]]), expected.mean(keepdims=True)
    )
    if models.teacher == models.student and not models.adapter and not abs(step["loss"]) < SAME:
        found.wrong.append(f"{name}: the loss of a student that is its teacher is {step['loss']:.2g}")
    if not np.isfinite(step["grad_norm"]):
        found.wrong.append(f"{name}: the gradient's norm is {step['grad_norm']}")


def rows_of(run: Path) -> list[cache.Record]:
    snapshot = cache.open(str(run / "cache"))
    return [snapshot[i] for i in range(len(snapshot))]


@dataclass
class Watch:
    """What a run shows besides its files: calls of transformers' `generate`, and the student before its first
    step.
    """

    generate_calls: int = 0
    padded_because: str = ""
    rows: list[cache.Record] = field(default_factory=list)
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0))


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    watch, train, generate = Watch(), stages.train.train, transformers.GenerationMixin.generate

    def watched_train(run: Run, student: Student, *rest: Any) -> None:
        watch.padded_because = student.padded_because
        watch.logprobs = probe.trainer_logprobs(student, watch.rows)
        train(run, student, *rest)

    def watched_generate(*arguments: Any, **values: Any) -> Any:
        watch.generate_calls += 1
        return generate(*arguments, **values)

    with (
        mock.patch.object(stages.train, "train", watched_train),
        mock.patch.object(transformers.GenerationMixin, "generate", watched_generate),
    ):
        yield watch


def _records(run: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, (run / "metrics.jsonl").read_text().splitlines())


# --- one type ---


def sweep(kind: str, folder: Path) -> dict[str, Any]:
    """The record of one type.

    Experts and indexed tokens are chosen by comparing numbers: now and then rounding decides, and a token is
    off. What is wrong in a few tokens and right with other weights is such a case, and noted as `ties`.
    """
    if kind in tiny_types.ENCODER_DECODERS:
        return {"verdict": "excluded"}
    record = sweep_seed(kind, folder / "first", 0)
    if tiny_types.is_half(kind):
        record["note"] = "the decoder alone of an encoder-decoder"
    if record["verdict"] == "wrong" and record["share_off"] <= TIES:
        again = sweep_seed(kind, folder / "second", 2)
        if again["verdict"] == "right":
            return record | again | {"ties": record["wrong"]}
    return record


def sweep_seed(kind: str, folder: Path, seed: int) -> dict[str, Any]:
    """The record of one type by weights of `seed` and the next."""
    try:
        models = [save(kind, folder / f"model{each}", each) for each in (seed, seed + 1)]
        leak = leak_of(models[0])
    except Exception as error:
        because = str(error) if isinstance(error, tiny_types.NotBuilt) else _sentence(error)
        return {"verdict": "not built", "because": because}
    record = as_student(models, folder / "sdpa", leak)
    if record["verdict"] == "refused" and "attn_implementation" in record["because"]:
        record = as_student(models, folder / "eager", leak, attn_implementation="eager") | {
            "attention": "eager"
        }
    if record["verdict"] == "refused":
        teacher = as_teacher(models[0], folder, record.get("attention", "sdpa"))
        record |= {
            "teacher": teacher,
            "verdict": "wrong" if teacher.startswith(("wrong", "breaks")) else "refused",
        }
    return record


def as_student(models: list[Path], folder: Path, leak: float, **values: Any) -> dict[str, Any]:
    """Both runs of a type, as student and teacher; `values`: settings."""
    found = Found(gaps={"looks ahead": float(f"{leak:.2g}")})
    try:
        judge(found, folder / "own" / "run", Models(models[0], models[0]), "own teacher", **values)
        adapter = stirred_adapter(folder / "own" / "run" / "student", folder / "adapter")
        second = Models(models[0], models[1], adapter)
        judge(found, folder / "other" / "run", second, "padded", packing="off", **values)
    except Refused as error:
        sentence = re.sub(rf"{models[0].parent}\S*", "FOLDER", str(error))
        return {"verdict": "refused", "because": sentence} | vars(found)
    except Exception as error:
        return {"verdict": "breaks", "because": _sentence(error), "where": _where(error)} | vars(found)
    if leak > EXACT:
        found.wrong.append(
            f"its forward looks ahead: a log-probability moves by {leak:.2g} with what follows"
        )
    return {"verdict": "wrong" if found.wrong else "right"} | vars(found)


def as_teacher(model: Path, folder: Path, attention: str) -> str:
    """What a type that is refused as a student does as the teacher of the arithmetic student."""
    found = Found()
    try:
        pair = Models(ROOT / TOKENIZER, model)
        judge(found, folder / "teacher" / "run", pair, "other student", attn_implementation=attention)
    except Refused as error:
        return "refused: " + re.sub(rf"{model.parent}\S*", "FOLDER", str(error))
    except Exception as error:
        return f"breaks: {_sentence(error)} ({_where(error)})"
    return f"wrong: {'; '.join(found.wrong)}" if found.wrong else "right"


def save(kind: str, folder: Path, seed: int = 0) -> Path:
    """Writes a tiny model of `kind`, with the arithmetic student's tokenizer; returns the folder."""
    model = tiny_types.tiny_model(kind, seed)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / TOKENIZER)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (
        model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):  # a part's: checkpoints have the whole's
        tiny_types.config_of(kind).save_pretrained(folder)
    return folder


@torch.no_grad()
def leak_of(folder: Path) -> float:
    """How far later tokens move a position's log-probabilities, nats: 0 for a causal model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(2, 230, (1, 48), generator=torch.Generator().manual_seed(0))
    whole = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    part = model(input_ids=ids[:, :31], use_cache=False).logits.log_softmax(-1)
    return float((whole[:, :31] - part).abs().max())


def stirred_adapter(exported: Path, folder: Path) -> Path:
    """A copy of an exported LoRA adapter whose update is random and not small, where a step of training had
    moved it.

    What no step moves acts in no forward: a router that reads its layer's weight by itself, say.
    """
    shutil.copytree(exported, folder)
    path, random = folder / "adapter_model.safetensors", torch.Generator().manual_seed(2)
    weights = load_file(path)
    for name, weight in weights.items():
        if ("lora_B" in name or "lora_embedding_B" in name) and weight.any():
            weights[name] = torch.randn(weight.shape, generator=random) * 0.1
    assert any(weight.abs().max() > 0.1 for name, weight in weights.items() if "lora_B" in name), (
        "no adapter moved"
    )
    save_file(weights, path, {"format": "pt"})
    return folder


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(
        f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in reversed(frames[-4:])
    )


# --- all types ---


def work(pipe: Connection) -> None:
    """A worker: takes the names of types and sends their records."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    while kind := pipe.recv():
        folder = Path(tempfile.mkdtemp(prefix="sweep-"))
        try:
            pipe.send(sweep(kind, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            gc.freeze()  # full collections, run by the stages, then skip what was imported


class Worker:
    """A process that sweeps types one after the other; a type that kills it or takes too long costs that
    process alone.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.num_types = 0

    def sweep(self, kind: str) -> dict[str, Any]:
        self.num_types += 1
        self._pipe.send(kind)
        try:
            if self._pipe.poll(SECONDS_A_TYPE):
                return self._pipe.recv()
        except EOFError:
            self.num_types = TYPES_A_WORKER
            return {"verdict": "breaks", "because": "the process died"}
        self.close()
        return {"verdict": "breaks", "because": f"it took more than {SECONDS_A_TYPE} s"}

    def close(self) -> None:
        self.num_types = TYPES_A_WORKER
        self._process.kill()
        self._process.join()


# --- command ---


def main() -> None:
    os.environ.update(ENVIRONMENT)  # before the workers import anything
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TYPE", help="these alone, whatever is known of them"
    )
    parser.add_argument(
        "--again", action="store_true", help="also the types that have a result with these versions"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that sweep at a time, up to 2 GiB each"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    known = {
        kind for kind, found in results.items() if found["versions"] == versions() and not arguments.again
    }
    kinds = arguments.only or [kind for kind in all_types() if kind not in known]
    run_types(kinds, results, arguments.out, arguments.workers)
    if arguments.out == RESULTS:
        PAGE.write_text(page(results))


def run_types(kinds: list[str], results: dict[str, Any], out: Path, num_workers: int) -> None:
    """Sweeps `kinds` and keeps each record in the file `out` as soon as it is there."""
    left, lock = iter(kinds), threading.Lock()

    def take() -> str | None:
        with lock:
            return next(left, None)

    def keep(kind: str, record: dict[str, Any], seconds: float) -> None:
        with lock:
            results[kind] = record | {
                "versions": versions(),
                "date": time.strftime("%Y-%m-%d"),
                "seconds": round(seconds),
            }
            out.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
            because = record.get("because") or "; ".join(record.get("wrong", []))
            print(f"{kind}: {record['verdict']} {because[:200]} ({seconds:.0f} s)", flush=True)

    def run() -> None:
        worker: Worker | None = None
        while kind := take():
            if worker is None or worker.num_types >= TYPES_A_WORKER:
                if worker is not None:
                    worker.close()
                worker = Worker()
            started = time.monotonic()
            keep(kind, worker.sweep(kind), time.monotonic() - started)
        if worker is not None:
            worker.close()

    with ThreadPoolExecutor(num_workers) as pool:
        for each in [pool.submit(run) for _ in range(num_workers)]:
            each.result()


def all_types() -> list[str]:
    """Those of `COMMON` first, settings within types last."""
    return list(
        dict.fromkeys(
            [
                *COMMON.values(),
                *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                *tiny_types.ENCODER_DECODERS,
                *tiny_types.VARIANTS,
            ]
        )
    )


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__, "peft": peft.__version__}


if __name__ == "__main__":
    main()
