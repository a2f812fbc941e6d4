"""The student: loading, LoRA or full fine-tuning, the forward to hidden states, policy hash and export."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from jaxtyping import Float
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from dualkl import Head
from stages.data.alignment import Aligned
from stages.models import ends, lora, pretrained, selfcheck
from stages.models.dropout import own_dropout, switch_off
from stages.models.packing import decoder_states, enable_packing, refuse_padding, unshared_because
from stages.models.readout import base_of, decoder_of, full_forward, output_weights
from stages.runtime.config import Config
from stages.runtime.errors import UserError, one_line
from stages.runtime.files import new_folder, publish_folder, replace_text


@dataclass(frozen=True)
class Student:
    """The trained model, a PeftModel under LoRA. `vocab_size`: ids below it are shared with the teacher."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    identity: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    compute_dtype: torch.dtype
    padded_because: str = "packing is off"  # why rows must be padded; "" if they are packed
    unshared_because: str = "packing is off"  # why packed rows cannot share prompts; "" if they can
    is_compiled: bool = False  # whether the decoder layers are compiled for training

    @property
    def packs(self) -> bool:
        return not self.padded_because

    @property
    def shares(self) -> bool:
        return not self.unshared_because

    @property
    def base(self) -> PreTrainedModel:
        return base_of(self.model)

    @property
    def head(self) -> Head:
        return pretrained.head_of(self.base)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def hidden(self, aligned: Aligned) -> Float[Tensor, "B T d"]:
        """Last hidden states (after the final norm) in the compute dtype; the head is not applied."""
        with self.autocast():
            return decoder_states(self.base, aligned).to(self.compute_dtype)


def load_student(
    config: Config, device: torch.device, vocab_size: int, tokenizer: PreTrainedTokenizerBase
) -> Student:
    """Load the student for training: frozen weights in `dtype`, trained weights in fp32."""
    models = config.models
    load_dtype = pretrained.DTYPES[config.run.dtype] if config.lora.use_lora else torch.float32
    base = pretrained.load_model(models.student_model, load_dtype, models.attn_implementation)
    eos = ends.student_ends(config, tokenizer, vocab_size)
    source = pretrained.identity(models.student_model)
    student = assemble(config, base, tokenizer, source, vocab_size, eos, device)
    student.model.to(device)  # type: ignore[arg-type]  # wrong stub of `to`
    return checked(student, config.train.packing)


def checked(student: Student, packing: bool | str) -> Student:
    """Use padded rows if packed ones are not exact (`selfcheck`); `UserError` if the model is unsupported."""
    base = student.base
    subject = selfcheck.Subject(
        base, partial(decoder_states, base), partial(full_forward, base), output_weights(base), side="student"
    )
    selfcheck.check_forwards(subject)
    padded_because = student.padded_because or selfcheck.packing_refused(subject)
    refuse_padding(base, packing, padded_because)
    selfcheck.check_training(subject, student.model, packed=not padded_because)
    selfcheck.check_writing(subject, student.model)
    unshared_because = selfcheck.sharing_refused(subject, padded_because)
    return replace(student, padded_because=padded_because, unshared_because=unshared_because)


def assemble(
    config: Config,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    vocab_size: int,
    eos: tuple[int, ...],
    device: torch.device,
) -> Student:
    """Make a student from a loaded model: adapters, packing, gradient checkpointing and compilation.

    `device`: the training device.
    """
    compute_dtype = pretrained.DTYPES[config.run.dtype]
    switch_off(base)
    padded_because = enable_packing(base, config.train.packing)
    torch.manual_seed(config.run.seed)
    model = _with_lora(config, base) if config.lora.use_lora else base
    if config.train.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compute_dtype == torch.bfloat16:
        _cast_once(model)
        lora.make_lean(model)
    is_compiled = config.train.compile
    if is_compiled == "auto":
        is_compiled = device.type == "cuda" and _layers(base) is not None and not _redraws(config, model)
    if is_compiled:
        compile_layers(base)
    unshared = unshared_because(base, padded_because)
    return Student(
        model, tokenizer, source, vocab_size, eos, compute_dtype, padded_because, unshared, is_compiled
    )


def _cast_once(model: nn.Module) -> None:
    """Stop adapters from casting bf16 inputs to fp32: autocast casts them back, so results are identical."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def compile_layers(base: PreTrainedModel) -> None:
    """Compile the decoder layers for training, equal ones once; evaluation and generation run uncompiled.

    Gradient checkpointing moves inside the compiled function, so only what gradients need is recomputed.
    Layers with checkpointing stay uncompiled if the compiler cannot trace their attention (packed rows
    without the flash kernel).
    Errors: `UserError` for a model without `layers` (GPT-2).
    """
    layers = _layers(base)
    if layers is None:
        raise UserError(
            f"compile: true, but a model of type {base.config.model_type} does not keep its decoder layers"
            " as `layers`; set compile: false."
        )
    torch._dynamo.config.optimize_ddp = False  # it would split a layer's graph at DDP's buckets
    compiled = torch.compile(_training_forward, dynamic=True)
    for layer in layers:
        recompute = bool(getattr(layer, "gradient_checkpointing", False))
        layer.gradient_checkpointing = False
        layer.forward = MethodType(_compiled_in_training(compiled, recompute), layer)  # survives a deep copy


def _redraws(config: Config, model: nn.Module) -> bool:
    """Whether a recomputed layer repeats dropout, which the compiler of torch 2.11 cannot do on a GPU."""
    has_dropout = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    return config.train.gradient_checkpointing and has_dropout


def _layers(base: PreTrainedModel) -> Any:
    return getattr(decoder_of(base), "layers", None)


def _compiled_in_training(compiled: Callable[..., Any], recompute: bool) -> Callable[..., Any]:
    def forward(layer: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        if not layer.training or not torch.is_grad_enabled():
            return type(layer).forward(layer, *arguments, **keywords)
        try:
            return compiled(layer, recompute, *arguments, **keywords)
        except BackendCompilerFailed as error:
            raise UserError(
                f"the student's layers could not be compiled ({str(error).splitlines()[0]}); install a C++"
                " compiler if there is none (g++, or the one that CXX names), or set compile: false; with"
                " gradient_checkpointing, lora_dropout: 0 may be enough."
            ) from error

    return forward


def _training_forward(layer: nn.Module, recompute: bool, *arguments: Any, **keywords: Any) -> Any:
    def forward() -> Any:
        return type(layer).forward(layer, *arguments, **keywords)

    return checkpoint(forward, use_reentrant=False) if recompute else forward()


def policy_hash(student: Student) -> str:
    """16 hex digits: hash of identity and trained weights; identity alone while the LoRA update is zero."""
    untouched = isinstance(student.model, PeftModel) and all(
        not p.any() for name, p in student.trainable.items() if "lora_B" in name
    )
    digest = hashlib.sha256(student.identity.encode())
    if not untouched:
        for name, parameter in sorted(student.trainable.items()):
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().reshape(-1).numpy().data)
    return digest.hexdigest()[:16]


def export(student: Student, folder: Path, notes: dict[str, str]) -> None:
    """Replace `folder` with a checkpoint (full) or PEFT adapter (LoRA), the tokenizer and the texts `notes`.

    Errors: `UserError` if the files cannot be written; the previous folder is kept.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        new_folder(partial)
        with own_dropout(student.base):
            student.model.save_pretrained(str(partial))
        student.tokenizer.save_pretrained(partial)
        for name, text in notes.items():
            replace_text(partial / name, text)
        publish_folder(partial, folder)
    except Exception as error:
        # tokenizers raises plain exceptions that mention "os error"
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the student could not be written to {folder} ({one_line(error)}). Free space, or make the"
            " folder accessible, and run the same command again; what is trained is kept."
        ) from error


def _with_lora(config: Config, base: PreTrainedModel) -> PeftModel:
    if config.models.student_adapter:
        folder = config.models.student_adapter
        try:
            model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(
                f"student_adapter {folder} cannot be put on the student ({one_line(error)})"
            ) from error
        head = base_of(model).get_output_embeddings()
        if any("lora_" in name for name, _ in head.named_parameters()):
            raise UserError(f"student_adapter {folder} adapts the lm_head; the loss applies the head itself.")
        _set_dropout(model, config.lora.lora_dropout)
        return model
    return new_lora(config, base)


def new_lora(config: Config, base: PreTrainedModel) -> PeftModel:
    """Add a new adapter to `base`; `UserError` for a name in `lora_targets` that matches no layer."""
    targets = config.lora.lora_targets
    names: str | list[str] = (
        targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    )
    settings = LoraConfig(
        r=config.lora.lora_r,
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=config.lora.lora_dropout,
        target_modules=names,
        exclude_modules=_unadapted(base) if names == "all-linear" else None,
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, settings)
    except ValueError as error:
        raise UserError(f"lora_targets {targets}: {error}") from error
    adapted = [f".{name}" for name in cast(LoraModel, model.base_model).targeted_module_names]
    for name in names if isinstance(names, list) else []:
        if not any(layer.endswith(f".{name}") for layer in adapted):
            raise UserError(f"lora_targets {targets}: the student has no layer {name} that can be adapted.")
    return model


def _set_dropout(model: PeftModel, p: float) -> None:
    """Replace the dropout saved with `student_adapter` by the configured one."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(p) if p > 0 else nn.Identity()


def _unadapted(base: PreTrainedModel) -> list[str] | None:
    """Linear layers that `all-linear` must exclude.

    These are routers that return more than a product, and projections whose weights Mamba's fused kernels
    read without calling the layer.
    """
    names = []
    for name, module in base.named_modules():
        parent = base.get_submodule(name.rpartition(".")[0])
        is_mamba = hasattr(parent, "A_log") and hasattr(parent, "D")
        if isinstance(module, nn.Linear) and (
            (is_mamba and name.endswith(("out_proj", "dt_proj"))) or not _is_product(module)
        ):
            names.append(name)
    return names or None


@torch.no_grad()
def _is_product(layer: nn.Linear) -> bool:
    if type(layer).forward is nn.Linear.forward:
        return True
    try:
        output = layer(layer.weight.new_zeros(1, layer.in_features))
    except (RuntimeError, ValueError, TypeError):
        return False
    return isinstance(output, Tensor) and output.shape == (1, layer.out_features)
