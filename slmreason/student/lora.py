"""Low-rank adapters (peft) on a student's network: what is trained in place of all weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class Lora:
    """Low-rank adapters (peft). The base weights stay frozen and serve as the reference policy."""

    r: int = 32
    """Rank."""
    alpha: int = 64
    """Scale; the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapters' input. GRPO's ratios want 0."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers to adapt; `all-linear` adapts all linear layers but the output embedding."""


def with_adapters(network: PreTrainedModel, lora: Lora, gradient_checkpointing: bool) -> Any:
    """peft's model around a network, which gets the adapters into its layers; its own weights are frozen."""
    from peft import LoraConfig, get_peft_model  # slow to import, and most commands do without

    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    if gradient_checkpointing:
        network.enable_input_require_grads()
    adapted = get_peft_model(network, settings)
    keep_adapters_float32(adapted)
    return adapted


class Adapter(nn.Linear):
    """One of the two matrices of a LoRA update: kept in float32, multiplied in the precision of its input.

    An update of half precision would lose most of what training adds to it. Products in float32 would double the memory
    that a step takes, since a layer's input would be kept in float32 for the backward pass.
    """

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """What `to`, `half` and `bfloat16` call, of this module or of one that holds it: moves, and does not round."""

        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.itemsize >= tensor.itemsize else tensor.to(changed.device)

        return super()._apply(moved, recurse)  # type: ignore[return-value]


def keep_adapters_float32(network: nn.Module) -> None:
    """Makes the matrices of every LoRA layer with linear maps (peft) an `Adapter`."""
    from peft.tuners.lora import LoraLayer  # slow to import, and most commands do without

    for layer in [module for module in network.modules() if isinstance(module, LoraLayer)]:
        for pair in (layer.lora_A, layer.lora_B):
            for name, linear in pair.items():
                if type(linear) is nn.Linear and linear.bias is None:
                    pair[name] = _adapter(linear)
                    layer.cast_input_dtype_enabled = False  # peft would cast the input to float32


def _adapter(linear: nn.Linear) -> Adapter:
    adapter = Adapter(linear.in_features, linear.out_features, bias=False, device="meta")
    adapter.weight = linear.weight
    return adapter
