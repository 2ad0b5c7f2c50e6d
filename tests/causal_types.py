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
}  # fmt: skip
"""What a config is made with, where it has such a setting."""
OWN: dict[str, dict[str, Any]] = {}
"""Settings that a type needs beside or in place of those; None leaves a setting as it is by default."""


def tiny_config(kind: str) -> Any:
    base = AutoConfig.for_model(kind)
    sizes = {name: _sizes(part) for name in base.sub_configs or {} if (part := getattr(base, name, None)) is not None}
    wanted = {**_sizes(base), **sizes, **OWN.get(kind, {})}
    return AutoConfig.for_model(kind, **{key: value for key, value in wanted.items() if value is not None})


def _sizes(config: Any) -> dict[str, Any]:
    sizes = {key: size for key, size in SIZES.items() if getattr(config, key, None) is not None}
    ids = {key: 0 for key in ("pad_token_id", "bos_token_id") if hasattr(config, key)}
    return sizes | ids | ({"eos_token_id": 2} if hasattr(config, "eos_token_id") else {})


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
