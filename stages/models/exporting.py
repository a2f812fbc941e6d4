"""A run's student as a folder that other software loads: an adapter, or all weights in the base's layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from transformers import GenerationConfig
from transformers.modeling_utils import PreTrainedModel

from stages.engine.weights import merged, seed_of
from stages.models import ends, folders, pretrained
from stages.models import student as students
from stages.models.dropout import own_dropout
from stages.models.readout import decoder_of
from stages.models.student import Student, policy_hash
from stages.runtime import checkpoint
from stages.runtime.config import Config, name_and_revision
from stages.runtime.errors import UserError

DTYPES = pretrained.DTYPES | {"fp16": torch.float16}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Source:
    """Where the trained weights are.

    Attributes:
        kind: a checkpoint, the best weights in the checkpoints' folder, or the student that the run exported.
        path: that folder.
        step: optimizer steps that they were trained for.
        policy_hash: hash that the run recorded for these weights; "" if it recorded none.
    """

    kind: Literal["checkpoint", "best", "student"]
    path: Path
    step: int
    policy_hash: str = ""


def find_source(folder: Path, config: Config, exports: list[dict[str, Any]]) -> Source:
    """Weights of the run in `folder`: the best ones if so configured, else its newest checkpoint.

    `exports`: the run's `export` records. Without any checkpoint, the student that they describe.
    Errors: `UserError` if nothing was trained.
    """
    checkpoints = folder / "checkpoints"
    hashes = {record["step"]: record["policy_hash"] for record in exports}
    best = checkpoint.best(checkpoints) if config.train.export_checkpoint == "best" else None
    if best is not None:
        return Source("best", checkpoints, best.step, hashes.get(best.step, ""))
    newest = checkpoint.latest(checkpoints)
    if newest is not None:
        position = checkpoint.read_position(newest)
        for refresh in position.refreshes.values():
            hashes.setdefault(refresh.step, refresh.policy_hash)
        return Source("checkpoint", newest, position.step, hashes.get(position.step, ""))
    if exports and (folder / "student").is_dir():
        return Source("student", folder / "student", exports[-1]["step"], exports[-1]["policy_hash"])
    raise UserError(
        f"the run in {folder} has no checkpoint yet, so there is no student to export; train it first"
        f" (dualkl run {folder / 'config.yaml'})."
    )


def load_trained(config: Config, source: Source) -> Student:
    """The student with the weights of `source`, on the CPU; frozen weights in the base's dtype.

    Errors: `UserError` if the base is not the model that was trained.
    """
    models, uses_lora = config.models, config.lora.use_lora
    is_student = source.kind == "student"
    tokenizer = pretrained.load_tokenizer(models.student_model)
    dtype = dtype_of(models.student_model) if uses_lora else torch.float32
    name = str(source.path) if is_student and not uses_lora else models.student_model
    base = pretrained.load_model(name, dtype, "sdpa")
    plain = {"packing": False, "compile": False, "gradient_checkpointing": False}
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update=plain),
            "models": models.model_copy(
                update={"student_adapter": str(source.path)} if is_student and uses_lora else {}
            ),
        }
    )
    identity = pretrained.identity(models.student_model)
    stops = ends.wanted_ends(config, tokenizer)
    student = students.assemble(config, base, tokenizer, identity, len(tokenizer), stops, CPU)
    if not is_student:
        read = checkpoint.load_best if source.kind == "best" else checkpoint.load_weights
        read(source.path, student.trainable)
    if source.policy_hash not in ("", policy_hash(student)):
        raise UserError(
            f"student_model {models.student_model} is not the model that the run was trained on, or its"
            f" weights are not those of step {source.step}; put that model back, or run this where it is."
        )
    return student


def dtype_of(name: str) -> torch.dtype:
    """Dtype of a model's weights by its config.json; float32 if that does not say."""
    config = pretrained.load_config(name)
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return next((dtype for dtype in DTYPES.values() if dtype == found), torch.float32)


@torch.no_grad()
def merge(model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """The student with its adapter in the weights: summed in fp32 and rounded once, as the engine does it.

    In bfloat16 they are the weights that wrote the run's rollouts and its held-out answers. Variants that the
    engine does not merge (DoRA, LoRA with a bias) are merged by PEFT, in fp32.
    """
    decoder = decoder_of(cast(PreTrainedModel, model.get_base_model()))
    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoraLinear):
            layer = merged(module, dtype, seed_of(name))
            if layer is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(decoder.get_submodule(parent), leaf, layer)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.get_base_layer().float()
    return model.merge_and_unload().to(dtype)


def save(student: Student, folder: Path, dtype: torch.dtype | None, generation: dict[str, Any]) -> None:
    """Write weights, tokenizer and chat template to `folder`, and `generation` as generation_config.json.

    An adapter names its base absolutely. `dtype`: of the written weights; None: an adapter's are fp32 as
    trained, others have the base's.
    """
    model = student.model
    if dtype is not None:
        model.to(dtype)  # type: ignore[arg-type]  # wrong stub of `to`
    with own_dropout(student.base):
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            model.save_pretrained(str(folder))
    student.tokenizer.save_pretrained(folder)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(generation, indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(settings.stat().st_mode)  # weights are written readable by their owner alone


def name_base(model: PeftModel, base: str) -> None:
    """Make an adapter's settings name `base` so that it is found from any folder."""
    _, revision = name_and_revision(base)
    for settings in model.peft_config.values():
        settings.base_model_name_or_path = absolute(base)
        settings.revision = None if Path(base).is_dir() or revision == "main" else revision


def absolute(name: str) -> str:
    """Absolute path of a model folder; the name alone for a model on the hub."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name_and_revision(name)[0]


def generation_of(base: str, stops: tuple[int, ...]) -> dict[str, Any]:
    """The base's generation settings, with the ids that ended the rollouts as its ends."""
    name, revision = name_and_revision(base)
    try:
        found = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # it has none
        found = GenerationConfig.from_model_config(pretrained.load_config(base))
    settings = found.to_diff_dict()
    settings.pop("_from_model_config", None)
    return settings | {"eos_token_id": stops[0] if len(stops) == 1 else list(stops)}


def differing(folder: Path, base: str) -> list[str]:
    """Tensors of `folder` that `base` does not have in that shape, or lacks; [] if its files are not known.

    A tied head is stored by some checkpoints and left out by transformers.
    """
    own, theirs = folders.stored_shapes(str(folder)), folders.stored_shapes(base)
    if not theirs:
        return []
    tied = {"lm_head.weight"} if pretrained.load_config(base).get_text_config().tie_word_embeddings else set()
    names = (own.keys() | theirs.keys()) - tied
    return sorted(name for name in names if own.get(name) != theirs.get(name))
