"""The teacher: forward passes only, under DeepSpeed ZeRO-3 or plain.

Under ZeRO-3 every forward is collective: all ranks call `hidden` equally often (with dummy rows where one has no work),
and nothing ever generates. The lm_head is gathered once at loading and kept whole on each rank, so that scoring can apply
it in chunks without further collectives.
"""

from __future__ import annotations

import gc
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from dualkl import Head
from stages.data.alignment import Aligned, align
from stages.models import checkpoints
from stages.models.attention import enable_packing, model_inputs
from stages.runtime import distributed
from stages.runtime.config import Config
from stages.runtime.distributed import World
from stages.runtime.errors import UserError


class _Backbone(nn.Module):
    """Root module for DeepSpeed, whose hooks need `forward` to be the root's own: a batch to last hidden states."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, aligned: Aligned) -> Tensor:
        inputs = model_inputs(aligned, self.model.config._attn_implementation)
        return self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state


@dataclass
class Teacher:
    """`forward` maps a batch to hidden states; `packs`: it takes packed rows too; `engine` is DeepSpeed's, if any."""

    forward: Any
    head: Head
    device: torch.device
    engine: Any = None
    packs: bool = False

    @property
    def is_collective(self) -> bool:
        return self.engine is not None

    @property
    def config(self) -> Any:
        """The model's own (transformers)."""
        backbone = self.forward if self.engine is None else self.engine.module
        return backbone.model.config

    @torch.no_grad()
    def hidden(self, aligned: Aligned) -> Float[Tensor, "B T D"]:
        """Last hidden states after the final norm, in the teacher's dtype."""
        return self.forward(aligned)

    def dummy(self) -> None:
        """A forward without meaning, for a rank that has no work while others do."""
        one = np.zeros(1, dtype=np.int64)
        self.hidden(align([one], [one], 0, self.device))

    def move(self, device: torch.device) -> None:
        """Moves the weights of a plain teacher; those of a sharded one stay where DeepSpeed keeps them."""
        if self.engine is None:
            self.forward.to(device)

    def close(self) -> None:
        """Gives all memory back."""
        if self.engine is not None:
            self.engine.destroy()
            # DeepSpeed's stack of running modules keeps the root of a forward without gradients, and with it all weights
            importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK.clear()
        self.forward = self.engine = self.head = None  # type: ignore[assignment]  # nobody uses a closed teacher
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class TeacherLoader:
    """Loads the scoring teacher at its first use and frees it at the end of a `with` block."""

    def __init__(self, config: Config, world: World):
        self.config, self.world = config, world
        self._teacher: Teacher | None = None

    def __enter__(self) -> TeacherLoader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._teacher is not None:
            self._teacher.close()
            self._teacher = None

    def get(self) -> Teacher:
        if self._teacher is None:
            self._teacher = load_teacher(self.config, self.world)
        return self._teacher


def load_teacher(config: Config, world: World) -> Teacher:
    """The teacher for scoring, as `teacher_ds_zero3` says."""
    return _load_zero3(config, world) if config.models.teacher_ds_zero3 else _load_plain(config, world)


def load_plain_model(config: Config, world: World) -> PreTrainedModel:
    """The whole teacher on this process's device, able to generate (evaluation only)."""
    models = config.models
    dtype = checkpoints.DTYPES[models.teacher_dtype]
    model = checkpoints.load_model(models.teacher_model, models.teacher_revision, dtype, models.attn_implementation)
    return model.requires_grad_(False).to(world.device)  # type: ignore[arg-type]  # typed as if self were an argument


def plain_model_fits(config: Config, world: World) -> bool:
    """Whether the plain teacher fits beside what the device holds already (weights and a tenth; always on a CPU)."""
    if world.device.type == "cpu":
        return True
    model_config = checkpoints.load_config(config.models.teacher_model, config.models.teacher_revision)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(model_config).parameters())
    bytes_each = checkpoints.DTYPES[config.models.teacher_dtype].itemsize
    free, _ = torch.cuda.mem_get_info(world.device)
    return num_parameters * bytes_each * 1.1 < min(world.gather(free))


def _load_plain(config: Config, world: World) -> Teacher:
    return plain_teacher(load_plain_model(config, world), world, config.train.packing)


def plain_teacher(model: PreTrainedModel, world: World, packing: bool | str) -> Teacher:
    """A model that is loaded already, as a scoring teacher; no second copy. `packing`: as in the configuration."""
    packs = not enable_packing(model, packing)
    return Teacher(_Backbone(model), checkpoints.head_of(model), world.device, packs=packs)


def _load_zero3(config: Config, world: World) -> Teacher:
    distributed.ensure_process_group(world)
    from transformers.integrations import HfDeepSpeedConfig

    settings = zero3_settings(config)
    models = config.models
    partition_while_loading = HfDeepSpeedConfig(settings)
    model = checkpoints.load_model(
        models.teacher_model,
        models.teacher_revision,
        checkpoints.DTYPES[models.teacher_dtype],
        models.attn_implementation,
    )
    del partition_while_loading  # while it lives, every from_pretrained partitions, the student's too
    return sharded_teacher(model, settings, world, config.train.packing)


def sharded_teacher(model: PreTrainedModel, settings: dict[str, Any], world: World, packing: bool | str) -> Teacher:
    """A model that is loaded already, whole or partitioned, as a ZeRO-3 teacher (collective)."""
    import deepspeed

    model.requires_grad_(False)
    packs = not enable_packing(model, packing)
    engine, *_ = deepspeed.initialize(model=_Backbone(model), config=settings)
    engine.eval()
    restore_rotary(model)
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "ds_tensor"), f"ZeRO-3 left {name} unpartitioned"
    return Teacher(engine, _gathered_head(model), world.device, engine, packs)


def _gathered_head(model: PreTrainedModel) -> Head:
    import deepspeed

    output = model.get_output_embeddings()
    with deepspeed.zero.GatheredParameters(list(output.parameters())):
        head = checkpoints.head_of(model)
        bias = None if head.bias is None else head.bias.detach().clone()
        return Head(head.weight.detach().clone(), bias=bias, scale=head.scale, softcap=head.softcap)


def restore_rotary(model: nn.Module) -> None:
    """Recomputes rotary frequencies in fp32, as plain loading has them.

    Loading in bf16 under ZeRO-3 rounds them to bf16, which turns the teacher into another model as positions grow
    (relative error of the last hidden state at 512 tokens 0.115 instead of 0.026).
    """
    for module in model.modules():
        if isinstance(getattr(module, "inv_freq", None), Tensor) and hasattr(module, "config"):
            fresh = type(module)(config=module.config)
            for name, buffer in fresh.named_buffers():
                current = getattr(module, name)
                setattr(module, name, buffer.to(current.device, torch.float32))


def zero3_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings for a forward-only stage-3 engine: built in, or the user's with their `auto`s filled in."""
    bf16 = config.models.teacher_dtype == "bf16"
    if not config.models.teacher_ds_config:
        stage_three = {"stage": 3, "stage3_param_persistence_threshold": 0}
        return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage_three, "bf16": {"enabled": bf16}}
    path = Path(config.models.teacher_ds_config)
    try:
        settings = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"teacher_ds_config {path} cannot be read as JSON: {error}") from error
    settings = _without_auto(settings)
    zero = settings.setdefault("zero_optimization", {}) if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise UserError(
            f"teacher_ds_config {path} is not a DeepSpeed configuration: it must be a JSON object of settings."
        )
    if zero.setdefault("stage", 3) != 3:
        raise UserError(
            f"teacher_ds_config {path} asks for ZeRO stage {zero['stage']}; the teacher is sharded with stage 3."
        )
    zero.setdefault("stage3_param_persistence_threshold", 0)  # the default keeps small tensors whole on every card
    settings.setdefault("train_micro_batch_size_per_gpu", 1)
    settings.setdefault("bf16", {})["enabled"] = bf16
    for key in ("optimizer", "scheduler", "fp16", "train_batch_size", "gradient_accumulation_steps"):
        settings.pop(key, None)
    return settings


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_auto(v) for k, v in value.items() if v != "auto"}
    return value
