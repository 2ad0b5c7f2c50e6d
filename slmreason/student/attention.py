"""Attention of packed sequences without a mask: each sequence for itself, so no pair across two of them is computed.

A name for `student.attn_implementation`, `varlen`, for models whose layers attend to all before and nothing else. On a
GPU in half precision it is PyTorch's kernel for sequences of different lengths; elsewhere one sequence after another.
Where sequences are not packed (prompts while they are read) it is sdpa, with sdpa's mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARLEN = "varlen"


def packing_arguments(position_ids: Tensor) -> dict[str, Any]:
    """What a model's forward takes to tell packed sequences apart, by transformers' names.

    Args:
        position_ids: start again at 0 with each sequence, and with each row. [R, L], int64.

    Returns:
        Where sequences begin and end in the rows read one after another ([S + 1], int32), the longest's length, and a
        mask that only says that none is to be made.
    """
    starts = (position_ids.flatten() == 0).nonzero().squeeze(1)
    edges = functional.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)
    longest = int(edges.diff().max())
    none = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=position_ids.device)
    return {"attention_mask": none, "cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest,
            "max_length_k": longest}  # fmt: skip


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. [R, heads, L, size] each -> [R, L, heads, size]"""
    if cu_seq_lens_q is None or max_length_q is None:
        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found, None
    flat_query, flat_key, flat_value = (heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value))
    kernel = _by_kernel if query.device.type == "cuda" and query.dtype != torch.float32 else _one_by_one
    found = kernel(flat_query, flat_key, flat_value, cu_seq_lens_q, max_length_q, scaling)  # [R L, heads, size]
    return found.unflatten(0, (query.shape[0], query.shape[2])), None


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, longest: int, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    found = varlen_attn(
        query, key, value, edges, edges, longest, longest, scale=scaling, window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(found, Tensor)  # a pair only where the log of the sums is asked for
    return found


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, edges: Tensor, longest: int, scaling: float | None
) -> Tensor:
    lengths = edges.diff().tolist()
    group = query.shape[1] // key.shape[1]
    whole = (query, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1))
    found: list[Tensor] = []
    for part in zip(*(heads.split(lengths) for heads in whole), strict=True):
        q, k, v = (heads.transpose(0, 1)[None] for heads in part)  # [1, heads, length, size]
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        found.append(attended[0].transpose(0, 1))
    return torch.cat(found)


AttentionInterface.register(VARLEN, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN, sdpa_mask)
