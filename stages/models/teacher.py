"""The teacher: forward passes only, plain or under DeepSpeed ZeRO-3.

Under ZeRO-3 every forward is collective: all ranks must call `hidden` (or `dummy`) equally often, and
`generate` is never called. Each rank gathers the whole lm_head once at loading, so scoring needs no further
collectives.
"""

from __future__ import annotations

import copy
import gc
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import init_empty_weights
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from dualkl import Head
from stages.data.alignment import Aligned, align
from stages.models import pretrained, quantization, selfcheck
from stages.models.float32 import NARROW, in_float32
from stages.models.packing import decoder_states, enable_packing, refuse_padding
from stages.models.readout import full_forward, output_weights, readout_of
from stages.models.sharding import gather_by_layers
from stages.runtime import distributed, host_memory
from stages.runtime.config import Config
from stages.runtime.distributed import World
from stages.runtime.errors import UserError


class _Backbone(nn.Module):
    """Map a batch to last hidden states; DeepSpeed's hooks need this to be its root module's `forward`."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Aligned | Tensor) -> Any:
        """States [B, T, D] of a batch; for ids [1, T] the result of `full_forward` (load-time check)."""
        return (
            full_forward(self.model, batch)
            if isinstance(batch, Tensor)
            else decoder_states(self.model, batch)
        )


@dataclass
class Teacher:
    """`forward`: batch -> hidden states; `engine`: DeepSpeed's, if sharded.

    `packs`: accepts packed rows; `unshared_because`: why they cannot share prompts, "" if they can.
    `in_host_memory`: the frozen weights of a plain teacher that has left the device before.
    """

    forward: Any
    head: Head
    device: torch.device
    engine: Any = None
    packs: bool = False
    unshared_because: str = "packing is off"
    in_host_memory: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    @property
    def shares(self) -> bool:
        return not self.unshared_because

    @property
    def is_collective(self) -> bool:
        return self.engine is not None

    @property
    def config(self) -> Any:
        """The transformers config of the model."""
        backbone = self.forward if self.engine is None else self.engine.module
        return backbone.model.config

    @torch.no_grad()
    def hidden(self, aligned: Aligned) -> Float[Tensor, "B T D"]:
        """Last hidden states after the final norm, in the teacher's dtype."""
        return self.forward(aligned)

    def dummy(self) -> None:
        """Dummy forward, for a rank without work while others have some."""
        one = np.zeros(1, dtype=np.int64)
        self.hidden(align([one], [one], 0, self.device))

    def move(self, device: torch.device) -> None:
        """Move the weights of a plain teacher; no effect on a sharded one.

        Frozen weights are copied to the host once, and their copies kept for the next time.
        """
        if self.engine is not None:
            return
        parameters = list(self.forward.parameters())
        is_plain = all(type(p) is nn.Parameter and not p.requires_grad for p in parameters)
        for parameter in parameters if is_plain and device.type == "cpu" else []:
            if parameter not in self.in_host_memory:
                self.in_host_memory[parameter] = parameter.data.to(device)
            parameter.data = self.in_host_memory[parameter]
        self.forward.to(device)

    def close(self) -> None:
        """Free all memory."""
        if self.engine is not None:
            _destroy(self.engine)
        self.forward = self.engine = self.head = None  # type: ignore[assignment]  # unusable from here on
        self.in_host_memory = {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class TeacherLoader:
    """Load the scoring teacher on first use, and free it at the end of a `with` block.

    `say` is given a line before loading, which takes a while. Between `used` blocks the device is free for
    other work.
    """

    def __init__(self, config: Config, world: World, say: Callable[[str], None] = lambda _: None):
        self.config, self.world, self._say = config, world, say
        self._teacher: Teacher | None = None
        self._waits = False  # in host memory

    def __enter__(self) -> TeacherLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the teacher; `get` loads it again."""
        if self._teacher is not None:
            self._teacher.close()
            self._teacher, self._waits = None, False

    @contextmanager
    def used(self) -> Iterator[TeacherLoader]:
        """At the end of the block, the teacher leaves the device (collective).

        A plain, unquantised one waits in host memory, unless that is short, so that it is neither read nor
        checked again. Any other is freed.
        """
        try:
            yield self
        except BaseException:
            self.close()
            raise
        if self._teacher is None:
            return
        if not self._may_wait(self._teacher):
            self.close()
            return
        self._teacher.move(torch.device("cpu"))
        self._waits = True
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def waiting(self) -> list[Tensor]:
        """Weights that wait in host memory."""
        return list(self._teacher.forward.parameters()) if self._teacher is not None and self._waits else []

    def _may_wait(self, teacher: Teacher) -> bool:
        """Whether the teacher can be moved, and as much again then stays free in host memory (collective)."""
        if teacher.is_collective or self.config.models.teacher_quantization != "none":
            return False
        weights = _weight_bytes(self.config) * self.world.size
        is_there = self.world.device.type == "cpu" or bool(teacher.in_host_memory)
        fits = host_memory.free_bytes() >= weights * (1 if is_there else 2)
        return all(self.world.gather(fits))

    def get(self) -> Teacher:
        if self._teacher is None:
            models, is_split = self.config.models, is_sharded(self.config, self.world.size)
            remark = " (whole: one process)" if models.teacher_ds_zero3 and not is_split else ""
            self._say(f"loading the teacher{remark} and checking how it computes")
            self._teacher = load_teacher(self.config, self.world)
        elif self._waits:
            self._teacher.move(self.world.device)
        self._waits = False
        return self._teacher


def is_sharded(config: Config, num_processes: int) -> bool:
    """Whether ZeRO-3 holds the scoring teacher: `teacher_ds_zero3` is set, and there are several processes or
    `teacher_ds_config` offloads weights.
    """
    return config.models.teacher_ds_zero3 and (num_processes > 1 or _offloads(config))


def _offloads(config: Config) -> bool:
    offload = zero3_settings(config)["zero_optimization"].get("offload_param") or {}
    return offload.get("device", "none") != "none"


def load_teacher(config: Config, world: World) -> Teacher:
    """The scoring teacher, sharded if `is_sharded`."""
    if is_sharded(config, world.size):
        return load_zero3(config, world)
    return plain_teacher(load_plain_model(config, world), world, config.train.packing)


def load_plain_model(config: Config, world: World) -> PreTrainedModel:
    """The whole teacher on this process's device."""
    models = config.models
    dtype = pretrained.DTYPES[models.teacher_dtype]
    settings = quantization.loading_settings(models.teacher_quantization, dtype, world.device)
    model = pretrained.load_model(models.teacher_model, dtype, models.attn_implementation, **settings)
    model.requires_grad_(False)
    if settings:
        quantization.compute_plainly(model)
        return model
    return model.to(world.device)  # type: ignore[arg-type]  # wrong stub of `to`


def check_writer(model: PreTrainedModel) -> None:
    """Check a teacher that generates text (evaluation), and select an engine that generates correctly."""
    subject = _plain_subject(model, _Backbone(model))
    selfcheck.check_forwards(subject)
    selfcheck.check_writing(subject, model)


def _plain_subject(model: PreTrainedModel, backbone: _Backbone) -> selfcheck.Subject:
    return selfcheck.Subject(model, backbone, backbone, output_weights(model), side="teacher")


def plain_model_fits(config: Config, world: World) -> bool:
    """Whether the plain teacher's weights plus 10 % fit in the free memory of all devices; True on a CPU."""
    if world.device.type == "cpu":
        return True
    free, _ = torch.cuda.mem_get_info(world.device)
    return _weight_bytes(config) * 1.1 < min(world.gather(free))


def resident_bytes(config: Config, num_gpus: int) -> float:
    """Bytes of the scoring teacher's weights per GPU.

    Plain: all. ZeRO-3: a shard, unless it is offloaded, and the whole head.
    """
    if not config.models.teacher_model:
        return 0.0
    if not is_sharded(config, num_gpus):
        return float(_weight_bytes(config))
    shard = 0.0 if _offloads(config) else _weight_bytes(config) / num_gpus
    return shard + _num_parameters(config.models.teacher_model).head * _itemsize(config)


def _weight_bytes(config: Config) -> int:
    """Bytes of the teacher in teacher_dtype, or quantized (not embeddings and head); reads no weights."""
    models = config.models
    whole, head = _num_parameters(models.teacher_model)
    if models.teacher_quantization == "none":
        return whole * _itemsize(config)
    is_tied = pretrained.load_config(models.teacher_model).get_text_config().tie_word_embeddings
    kept = head * (1 if is_tied else 2)
    return int(kept * _itemsize(config) + (whole - kept) * quantization.BYTES[models.teacher_quantization])


def _itemsize(config: Config) -> int:
    return pretrained.DTYPES[config.models.teacher_dtype].itemsize


class _Parameters(NamedTuple):
    """Numbers in the whole model and in its head."""

    whole: int
    head: int


@lru_cache(maxsize=4)
def _num_parameters(name: str) -> _Parameters:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(pretrained.load_config(name))
    head = sum(p.numel() for p in model.get_output_embeddings().parameters())
    return _Parameters(sum(p.numel() for p in model.parameters()), head)


def plain_teacher(model: PreTrainedModel, world: World, packing: bool | str) -> Teacher:
    """A scoring teacher that shares the weights of a loaded model. `packing`: the config key."""
    backbone = _Backbone(model)
    packs, unshared = _checked(_plain_subject(model, backbone), enable_packing(model, packing), packing)
    return Teacher(backbone, pretrained.head_of(model), world.device, packs=packs, unshared_because=unshared)


def _checked(subject: selfcheck.Subject, padded_because: str, packing: bool | str) -> tuple[bool, str]:
    """Whether packed rows are exact, and why they are not if they share prompts ("" if they are).

    `UserError` for an unsupported teacher (collective if it is).
    """
    selfcheck.check_forwards(subject)
    if not padded_because:
        padded_because = selfcheck.packing_refused(subject)
        refuse_padding(subject.model, packing, padded_because)
        if padded_because:
            distributed.say_once(f"the teacher scores padded rows: {padded_because}")
    return not padded_because, selfcheck.sharing_refused(subject, padded_because)


def load_zero3(config: Config, world: World) -> Teacher:
    """The scoring teacher under ZeRO-3, partitioned while it is read (collective)."""
    distributed.ensure_process_group(world)
    from transformers.integrations import HfDeepSpeedConfig

    settings = zero3_settings(config)
    models = config.models
    partition_while_loading = HfDeepSpeedConfig(settings)
    model = pretrained.load_model(
        models.teacher_model,
        pretrained.DTYPES[models.teacher_dtype],
        models.attn_implementation,
    )
    del partition_while_loading  # while it exists, from_pretrained partitions every model
    return sharded_teacher(model, settings, world, config.train.packing)


def sharded_teacher(
    model: PreTrainedModel, settings: dict[str, Any], world: World, packing: bool | str
) -> Teacher:
    """Make a ZeRO-3 teacher from a loaded model, whole or partitioned (collective)."""
    import deepspeed

    model.requires_grad_(False)
    padded_because = enable_packing(model, packing)
    settings = gather_by_layers(model, settings, world.device)
    engine, *_ = deepspeed.initialize(model=_Backbone(model), config=settings)
    engine.eval()
    restore_buffers(model)
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "ds_tensor"), f"ZeRO-3 left {name} unpartitioned"
    weight, bias = _gathered_head(model)
    subject = selfcheck.Subject(
        model,
        engine,
        engine,
        (weight, bias),
        exact=partial(in_float32, engine.module),
        side="teacher",
        agree=lambda gap: world.max([gap])[0],
    )
    packs, unshared = _checked(subject, padded_because, packing)
    readout = readout_of(model)
    head = Head(weight, bias=bias, scale=readout.scale, softcap=readout.softcap)
    return Teacher(engine, head, world.device, engine, packs, unshared)


def _destroy(engine: Any) -> None:
    """Destroy a ZeRO-3 engine, clear DeepSpeed's global references to it, and empty its weights.

    FWD_MODULE_STACK keeps the root module after a forward without gradients; an `lru_cache` of a
    coordinator's method keeps the modules once a trace is complete. Emptied weights cost nothing if another
    version of DeepSpeed keeps more references.
    """
    module = engine.module
    engine.destroy()
    offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    getattr(offload, "FWD_MODULE_STACK", []).clear()
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    for method in vars(coordinator.PartitionedParameterCoordinator).values():
        for cached in _caches_in(method):
            cached.cache_clear()
    for tensor in [*module.parameters(), *module.buffers()]:
        for part in (tensor, getattr(tensor, "ds_tensor", None)):
            if part is not None:
                part.data = torch.empty(0, dtype=part.dtype, device=part.device)


def _caches_in(function: Any, depth: int = 3) -> Iterator[Any]:
    """`lru_cache`s in a decorated function, which DeepSpeed's decorators hide in a closure."""
    if hasattr(function, "cache_clear"):
        yield function
    elif depth:
        for cell in getattr(function, "__closure__", None) or ():
            yield from _caches_in(cell.cell_contents, depth - 1)


def _gathered_head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    import deepspeed

    output = model.get_output_embeddings()
    with deepspeed.zero.GatheredParameters(list(output.parameters())):
        weight, bias = output_weights(model)
        return weight.detach().clone(), None if bias is None else bias.detach().clone()


def restore_buffers(model: PreTrainedModel) -> None:
    """Recompute in float32 the buffers (mainly rotary frequencies) that plain loading keeps in float32.

    Loading in bf16 under ZeRO-3 rounds them; the error grows with the position (relative error of the last
    hidden state at 512 tokens: 0.115 instead of 0.026).
    """
    computed = {
        f"{prefix}.{name}".lstrip("."): module
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    own = dict(model.named_buffers())
    rounded = [name for name in computed if name in own and own[name].dtype in NARROW]
    if not rounded:
        return
    with init_empty_weights(include_buffers=False):
        plain = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    fresh = dict(plain.named_buffers())
    for name in rounded:
        if fresh[name].dtype == torch.float32:
            setattr(computed[name], name.rpartition(".")[2], fresh[name].to(own[name].device))


def zero3_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed settings for a forward-only stage-3 engine.

    The default, or `teacher_ds_config` with `auto` values removed.
    """
    bf16 = config.models.teacher_dtype == "bf16"
    if not config.models.teacher_ds_config:
        stage_three = {"stage": 3, "stage3_param_persistence_threshold": 0}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": stage_three,
            "bf16": {"enabled": bf16},
        }
    path = Path(config.models.teacher_ds_config)
    try:
        settings = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"teacher_ds_config {path} cannot be read as JSON: {error}") from error
    settings = _without_auto(settings)
    zero = settings.setdefault("zero_optimization", {}) if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise UserError(
            f"teacher_ds_config {path} is not a DeepSpeed configuration: it must be a JSON object of"
            " settings."
        )
    if zero.setdefault("stage", 3) != 3:
        raise UserError(
            f"teacher_ds_config {path} asks for ZeRO stage {zero['stage']}; the teacher is sharded with"
            " stage 3."
        )
    # DeepSpeed's default keeps small tensors whole on every GPU.
    zero.setdefault("stage3_param_persistence_threshold", 0)
    settings.setdefault("train_micro_batch_size_per_gpu", 1)
    given = settings.get("bf16")
    settings["bf16"] = {**(given if isinstance(given, dict) else {}), "enabled": bf16}
    for key in ("optimizer", "scheduler", "fp16", "train_batch_size", "gradient_accumulation_steps"):
        settings.pop(key, None)
    return settings


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_auto(v) for k, v in value.items() if v != "auto"}
    return value
