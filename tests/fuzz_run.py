"""Fuzz a run's files: configuration, prompts, metrics, checkpoints, versions, evaluations, adapters.

    python -m tests.fuzz_run --minutes 60 --seed 1      # prints the seed and the number of each failing case

Each case changes one file of a small run (JSON half of the time with a matching seal) and reads it like the
commands do, in its own process. The process must end with success or one sentence, within `SECONDS` and at
most `MEGABYTES` above its initial memory.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import torch
import zstandard
from safetensors.torch import load_file
from torch import nn

import cache
from stages.data.prompts import training_prompts
from stages.loops import setup, versions
from stages.models import ends, folders, pretrained
from stages.report import summary, write_report
from stages.runtime import card, checkpoint, distributed, history, metrics
from stages.runtime.checkpoint import _digest
from stages.runtime.config import Config, parse_arguments
from stages.runtime.errors import UserError
from tests.fuzz_cache import MEGABYTES, RAW, SECONDS, each_case, flip, mutate_json, run_command, tree
from tests.support.helpers import DEMO, ROOT, STUDENT, run_python, small
from tests.support.tiny_runs import TINY

RECORDS: list[dict[str, Any]] = [
    {"prompt": "What is 2 plus 2?", "answer": "4"},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ]
    },
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]},
    {"instruction": "add", "input": "1 and 2", "output": "3", "history": [["a", "b"]]},
    {
        "messages": [{"role": "user", "content": "w"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
]
YAML = (
    b"&a [*a]",
    b"!!python/object:os.system {}",
    b"? [1]\n: 2\n",
    b"2001-99-99",
    b"<<: *x",
    b"\t- a",
    b"a: b: c",
    b"!x y",
)


def make_base(folder: Path) -> None:
    """A run with checkpoints, a published version, evaluations, a report, and data sets of all file types."""
    values = TINY | {"max_steps": 4, "refresh_every": 2, "eval_prompts": 4, "num_prompts": 16}
    run_python("-m", "stages.pipeline", *small(folder, **values)).expect_success()
    position = checkpoint.read_position(checkpoint.latest(folder / "demo/checkpoints") or folder)
    (folder / "demo/versions").mkdir()
    version = versions.Version(
        position.newest, position.step, position.refreshes[position.newest].policy_hash, 16
    )
    (folder / "demo/versions/newest.json").write_text(json.dumps(vars(version)))
    shutil.copytree(ROOT / STUDENT, folder / "model")
    data = folder / "data"
    data.mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    (data / "a.jsonl").write_bytes(lines)
    (data / "b.json").write_text(json.dumps(RECORDS))
    (data / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (data / "d.jsonl.zst").write_bytes(zstandard.compress(lines))
    (data / "e.csv").write_text('prompt,answer\n"What, now?",4\nwho,"a ""b"""\n')
    parquet.write_table(pa.Table.from_pylist(RECORDS[:2]), data / "f.parquet")
    shutil.copy(ROOT / "pipeline.yaml", folder / "config.yaml")


def change(path: Path, rng: random.Random) -> None:
    """Change one file: its bytes, or a value of its JSON with the seal that checkpoints have."""
    data, what = path.read_bytes(), rng.random()
    if path.suffix == ".json" and what < 0.6:
        body = mutate_json(json.loads(data), rng)
        if path.name == "state.json" and isinstance(body, dict):
            body.pop("sha256", None)
            body["sha256"] = _digest(json.loads(json.dumps(body)))
        path.write_text(json.dumps(body))
    elif path.suffix == ".jsonl" and what < 0.6:
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        if lines[at].strip():
            lines[at] = json.dumps(mutate_json(json.loads(lines[at]), rng)).encode()
        path.write_bytes(b"\n".join(lines))
    elif what < 0.7:
        at = rng.randrange(len(data) or 1)
        path.write_bytes(data[:at] + rng.choice((*RAW, *YAML)) + data[at:])
    else:
        path.write_bytes(flip(data, rng))


def use_config(folder: Path) -> None:
    parse_arguments(["--config", str(folder / "config.yaml")], "")


def use_prompts(folder: Path) -> None:
    tokenizer = pretrained.load_tokenizer(str(ROOT / STUDENT))
    for path in sorted((folder / "data").iterdir()):
        try:
            found = training_prompts(parse_arguments([*DEMO, "--dataset", str(path)], ""), tokenizer)
            assert all(len(prompt.ids) for prompt in found.prompts)
        except UserError as error:
            _one_line(error)


def use_run(folder: Path) -> None:
    """Read the report, the summary, and what a resumed run reads first."""
    run, config = folder / "demo", _config(folder)
    records = metrics.read(run / "metrics.jsonl")
    history.spans(records)
    card.model_card(records, config, card.Weights(4))
    summary(write_report(run, config), run, config)
    versions.newest(run)


def use_checkpoint(folder: Path) -> None:
    newest = checkpoint.latest(folder / "demo/checkpoints")
    if newest is None:
        return
    checkpoint.read_position(newest)
    trainable = {
        name: nn.Parameter(torch.zeros_like(tensor))
        for name, tensor in load_file(folder / "whole.safetensors").items()
    }
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    checkpoint.load(newest, trainable, optimizer, scheduler, distributed.start("cpu"))


def use_model(folder: Path) -> None:
    name = str(folder / "model")
    folders.open_config("student_model", name)
    folders.check_weights("student_model", name)
    pretrained.load_model(name, torch.float32, "sdpa", reads_weights=False)
    config = _config(folder, "--student_model", name, "--teacher_model", name)
    vocabulary = setup.shared_vocabulary(config)
    ends.check_ends(config, vocabulary.tokenizer, vocabulary.size)


def _config(folder: Path, *flags: str) -> Config:
    return parse_arguments([*DEMO, "--runs_dir", str(folder), *flags], "")


USES: dict[str, tuple[Callable[[Path], None], str]] = {
    "config": (use_config, "config.yaml"),
    "prompts": (use_prompts, "data/*"),
    "metrics": (use_run, "demo/metrics.jsonl"),
    "results": (use_run, "demo/eval/*.json"),
    "versions": (use_run, "demo/versions/newest.json"),
    "checkpoints": (use_checkpoint, "demo/checkpoints/*/*"),
    "models": (use_model, "model/*"),
}


def _one_line(error: Exception) -> None:
    if "\n" in str(error):
        raise AssertionError("more than a line") from error


def run_case(seed: int, base: Path, work: Path) -> str | None:
    """Run case `seed` in a child process that has ended on return; what went wrong, or None."""
    rng = random.Random(seed)
    name = rng.choice(sorted(USES))
    use, pattern = USES[name]
    folder = work / "run"
    shutil.copytree(base, folder)
    path = rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
    precious = tree(base)
    pid = os.fork()
    if pid == 0:
        _in_child(use, folder, path, rng, work)
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, status, usage = os.wait4(pid, 0)
    problem = None
    if code := os.waitstatus_to_exitcode(status):
        problem = f"exit {code}: {(work / 'log').read_text(errors='replace')[-1500:]}"
    elif (usage.ru_maxrss - started) // 1024 > MEGABYTES:
        problem = f"{usage.ru_maxrss // 1024} MB"
    elif tree(base) != precious:
        problem = "a file outside the run was changed"
    return None if problem is None else f"case {seed} ({name}, {path.relative_to(folder)}): {problem}"


def _in_child(use: Callable[[Path], None], folder: Path, path: Path, rng: random.Random, work: Path) -> None:
    code = 1
    try:
        log = os.open(work / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(SECONDS)
        change(path, rng)
        try:
            use(folder)
        except (UserError, cache.CacheError) as error:
            _one_line(error)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def campaign(seeds: Iterable[int], seconds: float) -> tuple[int, list[str]]:
    """Number of cases run, and a description of each failure; time starts once the base run exists."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-run-") as temporary:
        base = Path(temporary) / "base"
        make_base(base)
        newest = checkpoint.latest(base / "demo/checkpoints")
        assert newest is not None
        shutil.copy(newest / "student.safetensors", base / "whole.safetensors")
        return each_case(seeds, seconds, Path(temporary), lambda seed, work: run_case(seed, base, work))


if __name__ == "__main__":
    sys.exit(run_command(__doc__ or "", campaign))
