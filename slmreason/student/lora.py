"""Low-rank adapters (peft) on a student's network: what is trained in place of all weights."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

log = logging.getLogger(__name__)
OWN = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
"""Options of peft's that have a key of their own: student.lora.*."""
FIXED = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
         "inference_mode")  # fmt: skip
"""Options of peft's that say what the student is."""
BESIDE_ADAPTERS = "it trains or changes more than adapters of linear layers, which no checkpoint here holds"
NEEDS_CODE = "it needs code in the training loop, or in each forward pass, that slmreason does not have"
NOT_HERE = {
    "modules_to_save": BESIDE_ADAPTERS,
    "trainable_token_indices": BESIDE_ADAPTERS,
    "target_parameters": BESIDE_ADAPTERS,
    "layer_replication": BESIDE_ADAPTERS,
    "alora_invocation_tokens": NEEDS_CODE,
    "arrow_config": NEEDS_CODE,
    "monteclora_config": NEEDS_CODE,
    "megatron_config": NEEDS_CODE,
    "megatron_core": NEEDS_CODE,
    "use_qalora": NEEDS_CODE,
    "lora_bias": "where a layer has no bias it could not be merged",
}
"""Options of peft's that are refused, and why."""
INITS = ("gaussian", "orthogonal", "mica")
"""Initialisations by name that leave the weights below the adapters as they were."""
INITS_OF_WEIGHTS = ("pissa", "olora")
"""Initialisations by name, or how that begins, that take what the adapters begin with out of the weights below."""


@dataclass
class Lora:
    """Low-rank adapters (peft). The base weights stay frozen; with the adapters off they are the reference policy."""

    r: int = 32
    """Rank."""
    alpha: int = 64
    """Scale; the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapters' input. GRPO's ratios want 0."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers to adapt; `all-linear` adapts all linear layers but the output embedding."""

    options: dict[str, Any] | None = None
    """Further options of peft's LoraConfig by their names there, such as {use_dora: true} or
    {use_rslora: true, init_lora_weights: pissa}."""

    @property
    def changes_base(self) -> bool:
        """Whether the student with its adapters off is another than it was, from the start or after training."""
        options = self.options or {}
        init = str(options.get("init_lora_weights", "")).lower()
        return init.startswith(INITS_OF_WEIGHTS) or options.get("bias", "none") != "none"


def peft_config(lora: Lora) -> Any:
    """peft's LoraConfig of the settings.

    Raises:
        ValueError: LoraConfig has no such option, or refuses its value, or it cannot be used here.
    """
    from peft import LoraConfig  # slow to import, and most commands do without

    options = lora.options or {}
    known = [field.name for field in fields(LoraConfig) if field.name not in FIXED]
    for name, value in options.items():
        if fault := _fault_of(name, value, known):
            raise ValueError(f"student.lora.options.{name}: {fault}")
    try:
        return LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
            **options,
        )
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise ValueError(f"student.lora.options: peft refuses them: {_first_line(error)}") from error


def _fault_of(name: str, value: Any, known: list[str]) -> str:
    """Why an option cannot be used; empty where it can."""
    if name in OWN:
        return f"write student.lora.{OWN[name]} in its place"
    if name in FIXED:
        return "it says what the student is, and is set by slmreason"
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        return f"peft's LoraConfig has no such option{'; near: ' + ', '.join(near) if near else ''}"
    if name in NOT_HERE and value:
        return NOT_HERE[name]
    if name == "init_lora_weights" and not _is_known_init(value):
        names = ", ".join((*INITS, *INITS_OF_WEIGHTS))
        return (
            f"{value!r} is none of true, false, {names}, pissa_niter_N; others of peft's need data, and code to read it"
        )
    return ""


def _is_known_init(value: Any) -> bool:
    return isinstance(value, bool) or str(value).lower() in INITS or str(value).lower().startswith(INITS_OF_WEIGHTS)


def with_adapters(network: PreTrainedModel, lora: Lora, gradient_checkpointing: bool) -> Any:
    """peft's model around a network, which gets the adapters into its layers; its own weights are frozen.

    Raises:
        ValueError: peft cannot adapt this network so; the message says why.
    """
    from peft import get_peft_model  # slow to import, and most commands do without

    settings = peft_config(lora)
    if gradient_checkpointing:
        network.enable_input_require_grads()
    # What is taken out of the weights below is not in a checkpoint: it has to be the same in every process that makes
    # this student, whatever it has drawn before.
    with torch.random.fork_rng(devices=[], enabled=lora.changes_base):
        if lora.changes_base:
            torch.manual_seed(0)
        try:
            adapted = get_peft_model(network, settings)
        except Exception as error:  # an option that this network's layers do not take
            raise ValueError(
                f"student.lora: peft cannot adapt {type(network).__name__}: {_first_line(error)}"
            ) from error
    keep_adapters_float32(adapted)
    if any(has_variant(layer) for layer in lora_layers(adapted)):
        log.info("student.lora.options: decoding takes peft's own layers, which are slower than plain adapters")
    return adapted


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lora_layers(network: nn.Module) -> list[Any]:
    """peft's layers with adapters."""
    from peft.tuners.lora import LoraLayer  # slow to import, and most commands do without

    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def has_variant(layer: Any) -> bool:
    """Whether a LoRA layer does anything else than to add s (x A^T) B^T, in evaluation mode."""
    others = (getattr(layer, "lora_variant", {}), getattr(layer, "lora_bias", {}))
    return any(other.get(name) for other in others for name in layer.active_adapters)


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
    for layer in lora_layers(network):
        for pair in (layer.lora_A, layer.lora_B):
            for name, linear in pair.items():
                if type(linear) is nn.Linear and linear.bias is None:
                    pair[name] = _adapter(linear)
                    layer.cast_input_dtype_enabled = False  # peft would cast the input to float32


def _adapter(linear: nn.Linear) -> Adapter:
    adapter = Adapter(linear.in_features, linear.out_features, bias=False, device="meta")
    adapter.weight = linear.weight
    return adapter
