"""Starts a contender in a process of its own and reads what it found: see `own_run` and `trl_run`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.bakeoff.tasks import CONTENDERS, Rival
from bench.bakeoff.trl_run import Spec
from bench.measuring import ROOT, Record
from bench.trl_peer import environment
from stages.data.prompts import Prompt
from stages.models import pretrained
from stages.runtime.config import Config

if TYPE_CHECKING:
    from bench.bakeoff.worker import Place

POINTS = 6
"""Of measurement within `Rival.seconds`."""


def train(
    rival: Rival, config: Config, arguments: list[str], prompts: list[Prompt], folder: Path, place: Place
) -> Record:
    """What the contender found; its weights are in `folder`/found, one file a point."""
    contender, every = CONTENDERS[rival.contender], rival.seconds / POINTS
    out = folder / "found"
    if contender.arm:
        module, spec = "own_run", {"arguments": arguments, "every": every, "folder": str(out)}
    else:
        module, spec = "trl_run", asdict(_spec(rival, config, prompts, out, every))
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    command = [sys.executable, "-W", "ignore", "-m", f"bench.bakeoff.{module}", str(path)]
    variables = environment(place.vllm if contender.use_vllm else None)
    code = subprocess.run(command, cwd=ROOT, env=variables).returncode
    if code:
        raise RuntimeError(f"{rival.name}: {module} ended with code {code}; its error is above, in this log.")
    found: Record = json.loads((out / "found.json").read_text())
    return found


def _spec(rival: Rival, config: Config, prompts: list[Prompt], out: Path, every: float) -> Spec:
    contender, train = CONTENDERS[rival.contender], config.train
    tokenizer = pretrained.load_tokenizer(config.models.student_model)
    texts = [prompt.text for prompt in prompts]
    if tokenizer(texts)["input_ids"] != [prompt.ids.tolist() for prompt in prompts]:
        raise ValueError("the prompts' texts have other ids than the prompts; TRL would see other prompts.")
    return Spec(
        student=config.models.student_model,
        teacher=config.models.teacher_model,
        prompts=texts,
        folder=str(out),
        every=every,
        seconds=rival.seconds,
        device=config.run.device,
        dtype=config.run.dtype,
        batch_size=train.batch_size * contender.batch_factor,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_new_tokens=config.rollout.max_new_tokens,
        warmup_steps=train.warmup_steps,
        max_grad_norm=train.max_grad_norm,
        lr=rival.lr,
        beta=1.0,
        seed=rival.seed,
        use_vllm=contender.use_vllm,
    )


def short(measured: Record) -> dict[str, Any]:
    """A measurement without its bins."""
    return {name: value for name, value in measured.items() if name != "by_entropy"}
