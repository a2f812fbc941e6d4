"""Checks of model and adapter files before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.modeling_utils import PreTrainedModel

from stages.models import pretrained
from stages.models.student import new_lora
from stages.runtime.config import Config, name_and_revision
from stages.runtime.errors import UserError

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers tries them."""
TOKENIZER = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken")


def open_config(side: str, name: str) -> Any:
    """The model's config.json. `UserError` if this is not a causal LM; the message says what was found.

    `side`: config key of the model, e.g. "student_model".
    """
    folder = Path(name)
    if folder.is_file():
        raise UserError(f"{side} {name} is a file; give the folder of a model that transformers can load.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{side} {name} has no config.json: {_instead(folder)}.")
    if folder.is_dir() and not any(path for pattern in TOKENIZER for path in folder.glob(pattern)):
        raise UserError(
            f"{side} {name} has no tokenizer (tokenizer.json); copy that of the model that it was made from."
        )
    config = pretrained.load_config(name)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{side} {name} ({config.model_type}) is an encoder-decoder; give a decoder-only language model."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{side} {name} is of type {config.model_type}, which transformers does not load as a causal"
            " language model; give a decoder-only language model."
        )
    return config


def check_weights(side: str, name: str) -> None:
    """`UserError` if weight files of a local folder are missing, truncated or in an unsupported format."""
    folder = Path(name)
    if not folder.is_dir() or "transformers_weights" in (folder / "config.json").read_text():
        return
    for path in pretrained.weight_files(folder):
        if not path.is_file():
            raise UserError(f"{side}: {path} is not a regular file; move it out of the model's folder.")
    first = next((folder / file for file in WEIGHTS if (folder / file).exists()), None)
    if first is None:
        raise UserError(
            f"{side} {name} has no weights (expected {WEIGHTS[0]} or {WEIGHTS[1]}): {_instead(folder)}."
        )
    shards = [first]
    if first.suffix == ".json":
        shards = [folder / shard for shard in sorted(set(_index(side, first)["weight_map"].values()))]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise UserError(
                f"{side} {name} lacks {len(missing)} of the {len(shards)} files that {first.name} names, the"
                f" first is {missing[0]}; download them."
            )
    for shard in shards:
        _check_whole(side, shard)


def _instead(folder: Path) -> str:
    """Guess what a folder without a config or weights contains, for an error message."""
    if (folder / "adapter_config.json").is_file():
        base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
        wanted = f"give the model that it adapts ({base}), and this folder as student_adapter"
        return f"it is a LoRA adapter; {wanted}"
    if any(folder.glob("*.gguf")):
        return "it holds GGUF files, which are for llama.cpp; give the checkpoint that they were made from"
    if any(folder.glob("*/config.json")):
        inner = sorted(path.parent for path in folder.glob("*/config.json"))[-1]
        return f"did you mean {inner}?"
    return f"it holds {', '.join(sorted(path.name for path in folder.iterdir())[:5]) or 'nothing'}"


def _index(side: str, path: Path) -> dict[str, Any]:
    content = _json(path)
    if not isinstance(content.get("weight_map"), dict):
        raise UserError(f"{side}: {path} is not an index of weights; download it again.")
    return content


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _check_whole(side: str, path: Path) -> None:
    """`UserError` if a file is a Git LFS pointer, or its size disagrees with its safetensors header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(8) == b"version ":
            raise UserError(
                f"{side}: {path} is a Git LFS pointer, not the weights themselves; run `git lfs pull` there."
            )
    if path.suffix != ".safetensors":
        return
    try:
        start, tensors = _header(path)
        wanted = start + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{side}: {path} ({size:,} bytes) has no safetensors header; download it again."
        ) from None
    if size != wanted:
        raise UserError(
            f"{side}: {path} has {size:,} bytes, its header says {wanted:,}; it was cut off or changed,"
            " download it again."
        )


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Header size in bytes of a safetensors file, and its tensors by name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("longer than its file")
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    return 8 + length, tensors


def stored_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a model's safetensors files, by name; {} if it has none here."""
    first = next((path for file in WEIGHTS[:2] if (path := _local_file(name, file)) is not None), None)
    if first is None:
        return {}
    files = {first.name} if first.suffix != ".json" else set(_index(name, first)["weight_map"].values())
    headers = [_header(first.parent / file)[1] for file in sorted(files)]
    return {tensor: tuple(entry["shape"]) for header in headers for tensor, entry in header.items()}


def _local_file(name: str, file: str) -> Path | None:
    """Path of a file of a model folder, or of a hub model's files on this machine; None if it is not here."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    where, revision = name_and_revision(name)
    found = try_to_load_from_cache(where, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def check_adapter(config: Config) -> list[str]:
    """Remarks on `student_adapter`; `UserError` if it cannot be trained."""
    if not config.models.student_adapter:
        return []
    folder = Path(config.models.student_adapter)
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(
            f"student_adapter {folder} holds no adapter_config.json; give the folder of a PEFT adapter."
        )
    settings = _json(path)
    if not settings:
        raise UserError(f"student_adapter: {path} is not a JSON object; copy it again.")
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"student_adapter {folder} is of type {settings.get('peft_type')}; only LoRA can be trained on."
        )
    for key in ("modules_to_save", "trainable_token_indices"):
        if settings.get(key):
            raise UserError(
                f"student_adapter {folder} has {key} ({settings[key]}); only an adapter of LoRA layers alone"
                " can be trained on."
            )
    if "lm_head" in (settings.get("target_modules") or []):
        raise UserError(f"student_adapter {folder} adapts the lm_head; the loss applies the head itself.")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() and not weights.with_suffix(".bin").is_file():
        raise UserError(f"student_adapter {folder} has no adapter_model.safetensors.")
    if weights.is_file():
        _check_whole("student_adapter", weights)
    found, base = [], settings.get("base_model_name_or_path")
    if Path(str(base)).name != Path(name_and_revision(config.models.student_model)[0]).name:
        found.append(
            f"student_adapter {folder} was trained on {base}; here it goes on {config.models.student_model}"
        )
    if settings.get("r") != config.lora.lora_r:
        found.append(
            f"student_adapter {folder} has rank {settings.get('r')}, which is kept; lora_r"
            f" {config.lora.lora_r} is not read"
        )
    return found


def check_student(config: Config, model: PreTrainedModel) -> None:
    """`UserError` if the configured adapter does not fit the student; `model` is on the meta device."""
    if not config.lora.use_lora:
        return
    if not config.models.student_adapter:
        new_lora(config, model)
        return
    folder = Path(config.models.student_adapter)
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        settings.init_lora_weights = False  # a LoraConfig, as verified by check_adapter
        wanted = get_peft_model_state_dict(PeftModel(model, settings), save_embedding_layers=False)
        stored = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # PEFT raises many types
        raise UserError(
            f"student_adapter {folder} cannot be put on the student ({pretrained.why(error)})"
        ) from error
    base, advice = settings.base_model_name_or_path, "give the adapter's own base as student_model."
    for key in sorted(wanted.keys() & stored.keys()):
        if wanted[key].shape != stored[key].shape:
            raise UserError(
                f"student_adapter {folder} ({base}): {key} has shape {tuple(stored[key].shape)}, on the"
                f" student it is {tuple(wanted[key].shape)}; {advice}"
            )
    for what, keys in (
        ("lacks", wanted.keys() - stored.keys()),
        ("has, with no place on it,", stored.keys() - wanted.keys()),
    ):
        lora = sorted(key for key in keys if "lora_" in key)
        if lora:
            raise UserError(
                f"student_adapter {folder} ({base}) does not fit the student: it {what} {len(lora)} tensors,"
                f" the first is {lora[0]}; {advice}"
            )
