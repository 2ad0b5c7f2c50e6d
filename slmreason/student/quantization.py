"""A student whose frozen weights have four bits each: transformers loads them by bitsandbytes, adapters are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from slmreason.student.loading import multiplies_in_bfloat16
from slmreason.student.lora import Lora

Quantization = Literal["nf4"]
PLAIN_OPTIONS = ("use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform",
                 "layers_pattern")  # fmt: skip
"""Options of the adapters that go with quantized layers."""


def quantization_config(kind: Quantization, lora: Lora | None, dtype: torch.dtype | Literal["auto"]) -> Any:
    """What `from_pretrained` takes to load a model quantized.

    Args:
        dtype: of the products; `auto` is bfloat16 where the GPU multiplies in it, else float16.

    Raises:
        ValueError: bitsandbytes or a GPU is missing, or nothing could be trained; the message says what helps.
    """
    if lora is None:
        raise ValueError(f"student.quantization: {kind} weights are frozen; train adapters (student.lora.r 32)")
    beside = [name for name, value in (lora.options or {}).items() if value and name not in PLAIN_OPTIONS]
    if beside:
        raise ValueError(f"student.quantization: {kind} goes with plain adapters; leave out student.lora.options."
                         f"{beside[0]}")  # fmt: skip
    if find_spec("bitsandbytes") is None:
        raise ValueError(f'student.quantization: {kind} needs bitsandbytes: pip install "slmreason[quantization]"')
    if not torch.cuda.is_available():
        raise ValueError(f"student.quantization: {kind} needs a GPU (CUDA), and there is none here")
    if dtype == "auto":
        dtype = torch.bfloat16 if multiplies_in_bfloat16() else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is one of bitsandbytes'."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def dequantized(layer: nn.Module) -> Tensor:
    """A quantized layer's weight as its products take it. [N, K], in the dtype that it was read in"""
    from peft.utils.integrations import dequantize_module_weight  # slow to import, and most students do without

    weight: Tensor = dequantize_module_weight(layer)
    return weight.detach()


@contextmanager
def saved_plainly(model: Any) -> Iterator[None]:
    """Within it a model is saved as one that is not quantized, with the weights that it is given."""
    quantizer, said = getattr(model, "hf_quantizer", None), getattr(model.config, "quantization_config", None)
    if quantizer is None:
        yield
        return
    model.hf_quantizer = None
    del model.config.quantization_config
    try:
        yield
    finally:
        model.hf_quantizer, model.config.quantization_config = quantizer, said
