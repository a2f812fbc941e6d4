"""A tiny random model of every causal language model type that transformers knows, for
`bench/architectures.py`.

A type's default configuration says which settings it has. Settings known here by name become small, and
windows become shorter than the sweep's rows. `SPECIAL` holds what else a type needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

WIDTH, HEADS, GROUPS, HEAD_WIDTH, LAYERS, POSITIONS = 64, 4, 2, 16, 2, 256
ROWS = 232
"""Embeddings, for the 230 ids of the arithmetic student's tokenizer: padded, as in real checkpoints."""
WINDOW = 12
"""Places that a sliding layer sees, fewer than any prompt has."""
INIT = 0.15
LISTS_OF_LAYERS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "indexer_types",
    "no_rope_layers",
    "attn_layers",
    "attention_layers",
)
MOST_PARAMETERS = 5_000_000

SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "embedding_size"), WIDTH
    ),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("attention_hidden_size", "cross_attention_hidden_size", "lru_width"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(
        ("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), HEADS
    ),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), GROUPS
    ),
    **dict.fromkeys(("head_dim", "swa_head_dim", "attention_head_size", "d_head", "dim_head"), HEAD_WIDTH),
    **dict.fromkeys(("global_head_dim", "query_pre_attn_scalar", "kv_channels"), HEAD_WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), WIDTH
    ),
    **dict.fromkeys(
        ("dim_ff", "feed_forward_size", "n_inner", "intermediate_size_mlp", "shared_intermediate_size"), WIDTH
    ),
    **dict.fromkeys(("dense_intermediate_size", "prefix_dense_intermediate_size"), WIDTH),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32
    ),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(
        ("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1
    ),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("index_head_dim", "indexer_head_dim"), 16),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 2),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length"), POSITIONS
    ),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), WINDOW
    ),
    **dict.fromkeys(("local_attention", "attention_chunk_size", "keep_window_size", "index_topk"), WINDOW),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    "vocab_size": ROWS,
    "decoder_vocab_size": ROWS,
    "vocab_size_per_layer_input": ROWS,
    "hidden_size_per_layer_input": 16,
    "initializer_range": INIT,
    "init_std": INIT,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "use_sliding_window": True,
    "max_window_layers": LAYERS // 2,
    "qk_head_dim": 24,
    "is_decoder": True,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.6,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "logit_scale": 0.4,
    "lm_head_multiplier": 0.5,
    "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0,
    "output_logit_soft_cap": 5.0,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""Values of the settings of these names, wherever a configuration has them."""

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_SHARING = {
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
    "ple_embed_dim": 64,
    "ngram_vocab_size_base": 100,
}
_MANY = {
    "index_n_heads": 16
}  # of few heads a sum of ReLUs is often 0: ties, which topk breaks in its own way
_DOTS = _MANY | {
    "num_key_value_heads": HEADS,
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
    "head_dim": 24,
}
_BLT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDTH,
    "initializer_range": INIT,
    "vocab_size": ROWS,
    "max_position_embeddings": POSITIONS,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "axk2": _MANY,
    "deepseek_v32": _MANY,
    "deepseek_v4": _MANY,
    "glm_moe_dsa": _MANY,
    "hy_v4": _MANY,
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "whole": {
            "vocab_size": ROWS,
            "encoder_hash_byte_group_vocab": 100,
            "initializer_range": INIT,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "patcher_config": _BLT,
            "encoder_config": _BLT | {"hidden_size_global": WIDTH},
            "decoder_config": _BLT | {"hidden_size_global": WIDTH},
            "global_config": _BLT,
            "local_attention_window_len": WINDOW,
        }
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": GROUPS, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "dots3_note": _DOTS
    | {
        "outer": {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "adapter_in_dim": 32,
                "adapter_out_dim": WIDTH,
                "mlp_layer_types": ["dense"],
            },
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "adapter_input_size": 32,
                "adapter_out_dim": WIDTH,
                "downsample_hidden_size": 16,
            },
        }
    },
    "dots3_note_text": _DOTS,
    "gemma3": {"outer": {"vision_config": _VISION, "mm_tokens_per_image": 4}},
    "gemma3n_text": _SHARING,
    "git": {"vision_config": _VISION},
    "got_ocr2": {
        "outer": {
            "vision_config": _VISION | {"mlp_dim": 32, "output_channels": 16, "global_attn_indexes": [0]}
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "moss_transcribe_diarize": {
        "outer": {
            "audio_config": {
                "num_hidden_layers": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_attention_heads": 2,
            }
        }
    },
    "mllama": {
        "cross_attention_layers": [1],
        "outer": {
            "vision_config": {
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "attention_heads": 2,
                "vision_output_dim": 64,
                "image_size": 28,
                "intermediate_layers_indices": [0],
            }
        },
    },
    "phi4_multimodal": {
        "vision_config": _VISION | {"crop_size": 28},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 16],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "roc_bert": {
        "pronunciation_vocab_size": ROWS,
        "shape_vocab_size": ROWS,
        "pronunciation_embed_dim": 32,
        "shape_embed_dim": 32,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_WIDTH,
        "num_key_value_heads": HEADS,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "zamba2": {
        "num_key_value_heads": HEADS,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_WIDTH,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "minicpm3": {"dim_model_base": 32, "scale_emb": 2},
    "zaya": {"num_experts_per_tok": 1, "sliding_window": WINDOW, "layer_types": ["hybrid", "hybrid_sliding"]},
}
"""What a type needs besides, or in place of `SMALL`'s; `None` in a value of SMALL's name leaves the type's
own default.
"""

_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 40}
_LONG = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "bert: is_decoder false, as it ships": {"is_decoder": False},
    "falcon: alibi": {"alibi": True},
    "falcon: new_decoder_architecture": {"new_decoder_architecture": True},
    "gemma3_text: use_bidirectional_attention": {"use_bidirectional_attention": True},
    "gpt2: scale_attn_by_inverse_layer_idx, reorder_and_upcast_attn": {
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
    },
    "gpt_bigcode: multi_query false": {"multi_query": False},
    "gpt_neox: use_parallel_residual false": {"use_parallel_residual": False},
    "llama: attention_dropout 0.2": {"attention_dropout": 0.2},
    "llama: biases": {"attention_bias": True, "mlp_bias": True},
    "llama: dynamic rotary embeddings, rows beyond their length": {
        "max_position_embeddings": 40,
        "rope_parameters": _ROPE | {"rope_type": "dynamic", "factor": 4.0},
    },
    "llama: tied embeddings": {"tie_word_embeddings": True},
    "llama: yarn": {"rope_parameters": _ROPE | {"rope_type": "yarn", "factor": 4.0}},
    "mistral: no window": {"sliding_window": None},
    "mixtral: router_jitter_noise 0.2": {"router_jitter_noise": 0.2},
    "opt: layerdrop 0.5": {"layerdrop": 0.5},
    "opt: post-norm, narrower embeddings, as opt-350m": {
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 32,
    },
    "phi3: longrope, rows beyond the original length": {
        "rope_parameters": _ROPE | {"rope_type": "longrope"} | _LONG,
        "original_max_position_embeddings": 40,
    },
    "phimoe: router_jitter_noise 0.2": {"router_jitter_noise": 0.2},
    "qwen2: window in the last layer": {"layer_types": ["full_attention", "sliding_attention"]},
    "qwen2_moe: window in all layers": {"layer_types": ["sliding_attention"] * 2},
    "qwen3_moe: no window": {"use_sliding_window": False},
    "stablelm: use_parallel_residual, qk_layernorm": {"use_parallel_residual": True, "qk_layernorm": True},
}
"""Settings that change how a type computes, by `TYPE: what is set`."""
_DRAFTS = "it drafts for a Gemma 4 model, whose keys and values it reads, and takes no text of its own"
_AUDIO = "its ids are codes of audio, not of text"
EXCLUDED = {
    "gemma3n": "its vision tower needs the timm library; `gemma3n_text` is its language model",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "musicgen": _AUDIO,
    "musicgen_melody": _AUDIO,
}
"""Why types have no tiny model."""


ENCODER_DECODERS = [
    kind
    for kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
]
"""Types that `AutoModelForCausalLM` has no class for."""


class NotBuilt(Exception):
    """Why a type has no tiny model here."""


def settings_of(config: PretrainedConfig, special: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that make `config`, a type's default, small."""
    own = config.to_dict()
    found = {name: value for name, value in SMALL.items() if name in own}
    if own.get("n_inner", 0) is None:
        del found["n_inner"]
    if (
        "kv_lora_rank" in own
    ):  # latent attention: K of every head is made anew, its rotary part is one for all
        found |= (
            {"num_key_value_heads": HEADS, "head_dim": found["qk_rope_head_dim"]}
            if "qk_rope_head_dim" in own
            else {}
        )
    found |= _layer_lists(own)
    return found | special


def _layer_lists(own: dict[str, Any]) -> dict[str, Any]:
    """As many layers as there are kinds of them, `LAYERS` at least, and the lists that have an entry for
    each.
    """
    kinds: dict[str, list[Any]] = {}
    for name in LISTS_OF_LAYERS:
        values = own.get(name)
        if isinstance(values, list | tuple) and values:
            kinds[name] = list(dict.fromkeys(values))
            if kinds[name] == ["full_attention"] and own.keys() & {"sliding_window", "use_sliding_window"}:
                kinds[name] = ["sliding_attention", "full_attention"]
    if not kinds:
        return {}
    num_layers = max(LAYERS, *map(len, kinds.values()))
    number = {name: num_layers for name in ("num_hidden_layers", "num_layers") if name in own}
    return number | {name: [each[i % len(each)] for i in range(num_layers)] for name, each in kinds.items()}


def config_of(kind: str) -> Any:
    """The tiny configuration of the model type `kind`, or of a key of `VARIANTS`."""
    values = VARIANTS.get(kind, {})
    kind = kind.split(":")[0]
    special = SPECIAL.get(kind, {}) | values
    if "whole" in special:
        return AutoConfig.for_model(kind, **special["whole"])
    default = AutoConfig.for_model(kind, **special.get("default", {}))
    text = default.get_text_config()
    rest = {name: value for name, value in special.items() if name not in ("default", "outer")}
    small = settings_of(text, rest)
    if text is default:
        return AutoConfig.for_model(kind, **small)
    place = next(name for name, value in vars(default).items() if value is text)
    return AutoConfig.for_model(
        kind, **{place: small | {"model_type": text.model_type}}, **special.get("outer", {})
    )


def is_half(kind: str) -> bool:
    """Whether the causal class of `kind` is the decoder alone of an encoder-decoder."""
    return bool(
        kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and AutoConfig.for_model(kind).is_encoder_decoder
    )


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in eval mode: biases and all that is constant after the initialisation are random
    too.
    """
    if kind in EXCLUDED:
        raise NotBuilt(EXCLUDED[kind])
    config = config_of(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise NotBuilt(f"its tiny form still has {size:,} parameters")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stir(model)
    return model


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Noise on every parameter that its initialisation left constant, so that a lost one shows."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() == 1 else INIT))
