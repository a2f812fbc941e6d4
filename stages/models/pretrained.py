"""Load configs, tokenizers, models and heads from folders or the hub, for student and teacher."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import PreTrainedModel

from dualkl import Head
from stages.models.readout import output_weights, readout_of
from stages.runtime.config import name_and_revision
from stages.runtime.distributed import say_once
from stages.runtime.errors import UserError, one_line
from stages.runtime.network import needs_network, no_hub

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SOFTCAP = "attn_logit_softcapping"
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 64 * 1024


def identity(name: str) -> str:
    """Identity of a model: the hub's commit, or a sha256 of its config and samples of its weight files.

    Weight files of up to 4 MiB are hashed whole. For larger ones the hash covers the size, the first block
    (the safetensors header) and 63 evenly spaced blocks: this takes milliseconds for a 65 GB teacher, and
    still detects retrained weights.
    """
    folder = Path(name)
    if not folder.is_dir():
        where, revision = name_and_revision(name)
        return f"hub:{where}@{getattr(load_config(name), '_commit_hash', None) or revision}"
    digest = hashlib.sha256(
        (folder / "config.json").read_bytes() if (folder / "config.json").exists() else b""
    )
    for path in weight_files(folder):
        if not path.is_file():  # opening a pipe would block; `folders.check_weights` rejects it
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
                digest.update(file.read())
                continue
            for block in range(SAMPLED_BLOCKS):
                file.seek(block * (size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return f"sha256:{digest.hexdigest()[:32]}"


def weight_files(folder: Path) -> list[Path]:
    """Paths in a model folder with the name of a weight file, of any file type."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def load_config(name: str) -> Any:
    return _load(AutoConfig.from_pretrained, "model", name)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = _load(AutoTokenizer.from_pretrained, "tokenizer of", name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise UserError(
                f"the tokenizer of {name} has no pad, EOS, BOS or UNK token to pad with; give it a pad_token."
            )
    return tokenizer


def load_model(
    name: str,
    dtype: torch.dtype,
    attn_implementation: str,
    *,
    reads_weights: bool = True,
    **quantized: Any,
) -> PreTrainedModel:
    """Load a causal language model in eval mode, with only the EOS and pad ids of its generation_config.

    Other generation settings (Qwen3: temperature 0.6, top_p 0.95, top_k 20) would silently make rollouts
    off-policy. `reads_weights=False` only checks names and shapes, in a fraction of a second, and returns a
    model on the meta device. `quantized`: settings for quantised weights.
    Errors: `UserError` if a tensor is missing or has the wrong shape; unused tensors give a warning.
    """
    if attn_implementation == "sdpa" and getattr(load_config(name).get_text_config(), SOFTCAP, None):
        say_once(f"{name} attends eagerly: sdpa does not cap its attention logits")
        attn_implementation = "eager"
    settings: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported, and rejected below
        **quantized,
    }
    if not reads_weights:
        settings["device_map"] = "meta"
    try:
        model, found = _load(AutoModelForCausalLM.from_pretrained, "model", name, **settings)
    except UserError as error:
        if attn_implementation != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        say_once(f"{name} attends eagerly: transformers has no sdpa attention for models of its type")
        settings["attn_implementation"] = "eager"
        model, found = _load(AutoModelForCausalLM.from_pretrained, "model", name, **settings)
    _check_complete(name, found)
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    return model.eval()


def _check_complete(name: str, found: dict[str, Any]) -> None:
    """Reject tensors that transformers would initialise randomly; warn about those that it ignores."""
    if mismatched := sorted(found["mismatched_keys"]):
        key, stored, built = mismatched[0]
        raise UserError(
            f"model {name}: tensor {key} has shape {tuple(stored)} in the weights, but its config.json makes"
            f" it {tuple(built)}; config.json belongs to other weights."
        )
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model {name} lacks {len(missing)} of the tensors that its config.json asks for, the first is"
            f" {missing[0]}: they would be random numbers. Get the whole checkpoint, or the config.json that"
            " belongs to it."
        )
    if unused := sorted(found["unexpected_keys"]):
        say_once(
            f"warning: {name}: {len(unused)} unused tensors (not part of the architecture in its"
            f" config.json) are left out, the first is {unused[0]}"
        )


def head_of(model: PreTrainedModel) -> Head:
    """The lm_head as a `dualkl` head, with the measured logit scale and soft cap."""
    weight, bias = output_weights(model)
    readout = readout_of(model)
    return Head(weight, bias=bias, scale=readout.scale, softcap=readout.softcap)


def vocabulary_cut(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student_rows: int, teacher_rows: int
) -> int:
    """Size of the shared vocabulary: ids at or above it are padding, or known to one model only.

    `student_rows`, `teacher_rows`: rows of the two embeddings (Qwen3 pads 151,669 ids to 151,936).
    Errors: `UserError` if an id is a different token on each side, or exceeds the embedding of its model.
    """
    maps = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)]
    for side, ids, rows in (("student", maps[0], student_rows), ("teacher", maps[1], teacher_rows)):
        if max(ids) >= rows:
            raise UserError(
                f"the {side}'s tokenizer has id {max(ids)}, but its model has only {rows} embeddings."
            )
    cut = min(max(maps[0]), max(maps[1])) + 1
    conflicts = [i for i in range(cut) if maps[0].get(i) != maps[1].get(i)]
    if conflicts:
        i = conflicts[0]
        raise UserError(
            f"student and teacher tokenizers disagree on {len(conflicts)} of {cut} ids; the first is id {i}:"
            f" {maps[0].get(i)!r} against {maps[1].get(i)!r}. Distillation needs identical token ids: choose"
            " models of one family."
        )
    return cut


def why(error: Exception) -> str:
    """One-line reason why a library did not load a model, without its advice to trust remote code."""
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code of its own, which is never run; give a model of a type that transformers"
            " knows"
        )
    if "weights_only" in str(error):
        return "a .bin file of it holds more than tensors; only safetensors and plain weights are loaded"
    return one_line(error)


def _load(function: Any, what: str, name: str, **kwargs: Any) -> Any:
    """Call `function` on a model folder or hub name; never run, or prompt for, the model's own code."""
    is_folder = Path(name).is_dir()
    where, revision = name_and_revision(name)
    if not is_folder:
        if where.startswith(("/", "./", "../", "~")):
            raise UserError(f"{what} {name} cannot be loaded: there is no such folder.")
        kwargs["revision"] = revision
        if no_hub() and not isinstance(try_to_load_from_cache(where, "config.json", revision=revision), str):
            raise UserError(needs_network(what, name, "the folder of a model"))
    try:
        return function(where, trust_remote_code=False, **kwargs)
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a missing package, a broken pickle, wrong types in config.json ...
        is_unknown = (
            not is_folder
            and isinstance(error, OSError | ValueError)
            and "trust_remote_code" not in str(error)
        )
        hint = ": it is neither a model folder here nor on the hub" if is_unknown else ""
        raise UserError(f"{what} {name} cannot be loaded{hint} ({why(error)})") from error
