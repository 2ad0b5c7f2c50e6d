"""Small random models of every causal type that transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from slmreason.student import EMBEDDED

VOCABULARY = 599
"""Of the embedded tokenizer."""
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "d_model": 32, "n_ctx": 256, "n_positions": 256,
    "max_position_embeddings": 256, "num_hidden_layers": 4, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "n_inner": 64, "word_embed_proj_dim": 32, "head_dim": 8,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "decoder_layers": 2, "encoder_layers": 2,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "sliding_window": 24, "attention_window_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2,
    "n_group": 1, "topk_group": 1, "unpadded_vocab_size": VOCABULARY, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip
"""What a config is made with, where it has such a setting."""
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MIXED = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA2, "attn_layer_indices": [2], "layer_types": None},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots1": {
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "falcon": {"head_dim": None},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 24},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["mamba", "mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "kimi_linear": {"layer_types": MIXED, **LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {
        "num_hidden_layers": None,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4,
        "num_encoder_attention_heads": 4,
    },
    "qwen3_next": {**LINEAR, "layer_types": MIXED},
    "qwen3_5_text": {**LINEAR, "layer_types": MIXED},
    "qwen3_5_moe_text": {**LINEAR, "layer_types": MIXED},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [16, 16],
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "hidden_size": 32,
        "feed_forward_size": 64,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    },
    "qwen4_exp_text": {
        "layer_types": MIXED,
        **LINEAR,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 50,
        "hc_lowrank": 8,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "longcat_flash": {"num_key_value_heads": None},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None, "head_dim": None},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "zamba": {
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_hidden_layers": 6,
        "attention_head_dim": 16,
        "layers_block_type": None,
        "mamba_d_state": 8,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "layer_types": None,
        "mamba_headdim": 8,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "n_mamba_heads": 8,
    },
}
"""Settings that a type needs beside or in place of those; None leaves a setting as it is by default."""


def tiny_config(kind: str) -> Any:
    base = AutoConfig.for_model(kind)
    sizes = {name: _sizes(part) for name in base.sub_configs or {} if (part := getattr(base, name, None)) is not None}
    wanted = {**_sizes(base), **sizes, **OWN.get(kind, {})}
    return AutoConfig.for_model(kind, **{key: value for key, value in wanted.items() if value is not None})


def _sizes(config: Any) -> dict[str, Any]:
    sizes = {key: size for key, size in SIZES.items() if vars(config).get(key) is not None or _mapped(config, key)}
    if "qk_rope_head_dim" in sizes:  # a head's size is made of its parts
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    ids = {key: 0 for key in ("pad_token_id", "bos_token_id") if hasattr(config, key)}
    return sizes | ids | ({"eos_token_id": 2} if hasattr(config, "eos_token_id") else {})


def _mapped(config: Any, key: str) -> bool:
    return key in config.attribute_map


def make_model(folder: Path, kind: str) -> Path:
    """A checkpoint whose weights are so large that every difference shows."""
    config = tiny_config(kind)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    network.generation_config = GenerationConfig(eos_token_id=2)
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED / "qwen2").save_pretrained(folder)
    return folder


NOT_MADE = {
    "cohere_compass_text": "its class reads positions of layer types that its own config does not give",
    "dots3_note": "its parts must fit one another in a dozen sizes",
    "gemma3n": "needs timm, for images",
    "gemma4_assistant": "drafts for another model",
    "musicgen": "makes audio: its config is of three models",
    "musicgen_melody": "makes audio: its config is of three models",
    "qwen4_exp": "a part within a part of its config has no small form of its own; its text model is tested",
}
"""Types of which no small model is made here, and why."""
