"""A decoder's matrix products in the form that decodes fastest while nothing is trained.

- In float32, adapters are folded into the weights, which are put back after: nothing is rounded away.
- In half precision and under autocast they stay beside the weights, those with one input in one product. Folded in,
  small updates would be rounded away, and the sampler would be another policy than the one that is trained.
- Where the copies below are made in half precision, a product takes adapters with it: [x, x A^T] times [W, B]^T. It
  takes SiLU and the product of gate and up with it too, which are passes over the MLP's width else.
- On a GPU a step is launches of kernels: q, k and v are one product, gate and up another, on views of one tensor.
- On a CPU each product first puts its weight in the order in which the processor reads it: large ones have a copy in
  that order.

What is sharded, quantised or adapted in another way is called as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slmreason.student import Student
from slmreason.student.logprobs import compute_dtype, logits_of
from slmreason.student.lora import has_variant, lora_layers
from slmreason.student.optimizer import HALF
from slmreason.student.weights import units

log = logging.getLogger(__name__)

PACKED_ELEMENTS = 1 << 19
"""Matrices from this size on have a copy in the processor's own order."""
PACKED_FROM = 32
"""Decoding steps from which on that copy pays: to make it takes as long as it saves in about twelve."""
STACKED_ON = ("cuda",)
"""Device types on which products with one input are one. A CPU gains 1 % by it, and keeps the bits of each alone."""
SHARE_OF_FREE_MEMORY = 0.5
"""A copy of weights may take this much of what is free."""


@dataclass(frozen=True)
class Layer:
    """The products of one layer, on hidden states [rows, hidden]."""

    qkv: Callable[[Tensor], Sequence[Tensor]]
    out: Callable[[Tensor], Tensor]
    gated: Callable[[Tensor], Tensor]
    """silu(gate(x)) * up(x): [rows, hidden] -> [rows, MLP width]"""
    down: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Projections:
    """All products of a decoder of Llama's shape."""

    layers: list[Layer]
    head: Callable[[Tensor], Tensor]
    """[rows, hidden] -> [rows, vocab]"""


def plain(model: Any) -> Projections:
    """The modules of a causal language model as they are."""
    layers = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(Layer(
            _each([attention.q_proj, attention.k_proj, attention.v_proj]), attention.o_proj,
            _gated(_each([mlp.gate_proj, mlp.up_proj])), mlp.down_proj,
        ))  # fmt: skip
    return Projections(layers, model.lm_head)


def fast(student: Student, steps: int = PACKED_FROM) -> Projections:
    """The fastest form of them (see above) for that many steps; good until a weight changes. Within `folded`."""
    model = student.base_model
    if units(student.network):
        return plain(model)
    packs = steps >= PACKED_FROM and _packs(student)
    layers = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(Layer(
            _together([attention.q_proj, attention.k_proj, attention.v_proj], packs), _alone(attention.o_proj, packs),
            _gated_together(mlp.gate_proj, mlp.up_proj, packs), _alone(mlp.down_proj, packs),
        ))  # fmt: skip
    return Projections(layers, _head(model.lm_head, packs))


@contextmanager
def folded(student: Student) -> Iterator[bool]:
    """Within it, LoRA's adapters are part of the weights, where that rounds nothing away; it says whether they are.

    In float32 alone. The weights themselves are kept aside and put back, so they come out bit for bit as they were;
    that takes the memory of the adapted matrices a second time.
    """
    layers = _foldable(student)
    kept = [(layer, layer.get_base_layer().weight.data, layer.merged_adapters) for layer in layers]
    try:
        for layer, weight, _ in kept:
            layer.get_base_layer().weight.data = sum((layer.get_delta_weight(name) for name in _active(layer)), weight)
            layer.merged_adapters = _active(layer)
        yield bool(layers)
    finally:
        for layer, weight, merged in kept:
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters = merged


def _foldable(student: Student) -> list[Any]:
    """The LoRA layers that `folded` folds: all, or none."""
    if student.lora is None or units(student.network):
        return []
    layers = [layer for layer in lora_layers(student.network) if _active(layer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    if not weights or any(compute_dtype(w) != torch.float32 or w.dtype != torch.float32 for w in weights):
        return []
    if not all(_is_plain_lora(layer) for layer in layers):
        return []
    return layers if _fits(sum(weight.nbytes for weight in weights), student.device, "fold the adapters") else []


def _active(layer: Any) -> list[str]:
    """The adapters that a LoRA layer adds to its product, unless it holds them in its weights already."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_plain_lora(module: Any) -> bool:
    """Whether a LoRA layer does y = x W^T + b + s (x A^T) B^T and nothing else, in evaluation mode."""
    return type(module.get_base_layer()) is nn.Linear and not has_variant(module)


# -- products ---------------------------------------------------------------------------------------------------------


class Product:
    """x W^T + b + (x A^T) B^T, the latter where there are adapters. [rows, K] -> [rows, N]"""

    def __init__(self, weight: Tensor, bias: Tensor | None, side: tuple[Tensor, Tensor] | None, packs: bool) -> None:
        """
        Args:
            weight: [N, K]
            side: (A [r, K], B [N, r] times the adapters' scale), in the dtype of the weight.
            packs: have a copy of the weight in the processor's order.
        """
        self.dtype, self.bias, self.side, self.packs = weight.dtype, bias, side, packs
        self.fuses = packs and weight.dtype in HALF
        """Adapters, and what comes after the product, are part of it; their sums are rounded once."""
        if self.fuses and side is not None:
            weight = torch.cat([weight, side[1]], dim=1)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if packs else weight

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.packs:
            hidden = self._input(hidden)
            found: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")
        else:
            hidden = hidden.to(self.dtype)
            found = functional.linear(hidden, self.weight, self.bias)
        if self.side is not None and not self.fuses:
            down, up = self.side
            found.addmm_(functional.linear(hidden, down), up.t())
        return found

    def silu(self, hidden: Tensor) -> Tensor:
        """SiLU of the product, where it `fuses`."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            self._input(hidden), self.weight, self.bias, "swish", [], ""
        )  # fmt: skip
        return found

    def times(self, hidden: Tensor, factor: Tensor) -> Tensor:
        """The product times a factor for each of its numbers, where it `fuses`."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            self._input(hidden), factor, self.weight, self.bias, "mul"
        )
        return found

    def _input(self, hidden: Tensor) -> Tensor:
        """What the weight in the processor's order is multiplied by."""
        hidden = hidden.to(self.dtype)
        if self.side is None or not self.fuses:
            return hidden
        return torch.cat([hidden, functional.linear(hidden, self.side[0])], dim=-1)


def _each(modules: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    return lambda hidden: [module(hidden) for module in modules]


def _gated(gate_up: Callable[[Tensor], Sequence[Tensor]]) -> Callable[[Tensor], Tensor]:
    def gated(hidden: Tensor) -> Tensor:
        gate, up = gate_up(hidden)
        return functional.silu(gate) * up

    return gated


def _gated_together(gate_proj: nn.Module, up_proj: nn.Module, packs: bool) -> Callable[[Tensor], Tensor]:
    gate, up = _product([gate_proj], packs), _product([up_proj], packs)
    if gate is None or up is None or not (gate.fuses and up.fuses):
        return _gated(_together([gate_proj, up_proj], packs))
    return lambda hidden: up.times(hidden, gate.silu(hidden))


def _alone(module: nn.Module, packs: bool) -> Callable[[Tensor], Tensor]:
    product = _product([module], packs)
    return module if product is None else product


def _together(modules: Sequence[nn.Module], packs: bool) -> Callable[[Tensor], Sequence[Tensor]]:
    """The products of modules that have one input."""
    product = _product(modules, packs)
    if product is None:
        return _each(modules)
    sizes = [module.out_features for module in modules]
    return lambda hidden: product(hidden).split(sizes, dim=-1)  # type: ignore[arg-type]


def _product(modules: Sequence[nn.Module], packs: bool) -> Product | None:
    """One product in place of several modules' with one input; None where the modules are best called as they are."""
    bases: list[Any] = [getattr(module, "get_base_layer", lambda it=module: it)() for module in modules]
    adapted = [module for module in modules if hasattr(module, "get_base_layer")]
    if not all(type(base) is nn.Linear for base in bases) or not all(_is_plain_lora(module) for module in adapted):
        return None
    weights: list[Any] = [base.weight for base in bases]
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        return None
    dtype, device = compute_dtype(weights[0]), weights[0].device.type
    sides = [_side(module, dtype) if module in adapted else None for module in modules]
    packs = packs and sum(weight.numel() for weight in weights) >= PACKED_ELEMENTS
    stacks = device in STACKED_ON
    if not stacks and not packs and not any(side is not None for side in sides):
        return None
    if len(weights) == 1:
        weight = weights[0].data.to(dtype)
    elif stacks and dtype == weights[0].dtype:
        weight = side_by_side(weights)
    else:
        weight = torch.cat([weight.data.to(dtype) for weight in weights])
    return Product(weight, _joined_bias(bases, dtype), _joined_sides(weights, sides, dtype), packs)


def side_by_side(weights: Sequence[nn.Parameter]) -> Tensor:
    """One tensor of weights that lie one behind another in memory. [N_i, K] -> [sum of N_i, K]

    They are moved there, once, if they do not lie so yet: each becomes a view with the values it had, and what changes
    it in place changes the whole.
    """
    if not _lie_side_by_side(weights):
        with torch.inference_mode(False):  # what it makes could never be trained again
            whole = torch.cat([weight.data for weight in weights])
        for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
            weight.data = part
    first = weights[0].data
    return first.as_strided((sum(len(weight) for weight in weights), first.shape[1]), first.stride())


def _lie_side_by_side(weights: Sequence[nn.Parameter]) -> bool:
    storage, place = weights[0].untyped_storage().data_ptr(), weights[0].storage_offset()
    for weight in weights:
        at_place = weight.untyped_storage().data_ptr() == storage and weight.storage_offset() == place
        if not at_place or not weight.is_contiguous():
            return False
        place += weight.numel()
    return True


def _side(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """(A [r, K], B [N, r] times the scale) of a module's adapters. Rounding them is no more than any product's."""
    names = _active(module)
    if not names:
        return None
    downs = [module.lora_A[name].weight.data for name in names]
    ups = [module.lora_B[name].weight.data.float() * module.scaling[name] for name in names]
    return torch.cat(downs).to(dtype), torch.cat(ups, dim=1).to(dtype)


def _joined_bias(bases: Sequence[Any], dtype: torch.dtype) -> Tensor | None:
    if all(base.bias is None for base in bases):
        return None
    parts = [base.weight.new_zeros(base.out_features) if base.bias is None else base.bias.data for base in bases]
    return torch.cat(parts).to(dtype)


def _joined_sides(
    weights: Sequence[Tensor], sides: Sequence[tuple[Tensor, Tensor] | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """The A's below one another, the B's in blocks: each output has the adapter of its own module."""
    there = [side for side in sides if side is not None]
    if not there:
        return None
    empty = [(weight.new_zeros(0, weight.shape[1], dtype=dtype), weight.new_zeros(len(weight), 0, dtype=dtype))
             for weight in weights]  # fmt: skip
    pairs = [none if side is None else side for side, none in zip(sides, empty, strict=True)]
    return torch.cat([down for down, _ in pairs]), torch.block_diag(*[up for _, up in pairs])


def _head(head: nn.Module, packs: bool) -> Callable[[Tensor], Tensor]:
    if type(head) is not nn.Linear:
        return head
    dtype = compute_dtype(head.weight)
    if head.weight.device.type in STACKED_ON and dtype in (torch.bfloat16, torch.float16):
        weight, bias = head.weight.data.to(dtype), None if head.bias is None else head.bias.data.to(dtype)
        return lambda hidden: logits_of(hidden.to(dtype), weight, bias)
    return _alone(head, packs)


# -- memory -----------------------------------------------------------------------------------------------------------


def packed_bytes(student: Student) -> int:
    """What copies of the large matrices in the processor's order take; 0 where that order is not to be had."""
    weights = [p for p in student.base_model.parameters() if p.ndim == 2 and p.numel() >= PACKED_ELEMENTS]
    if student.device.type != "cpu" or not weights or not torch.backends.mkldnn.is_available():
        return 0
    dtype = compute_dtype(weights[0])
    if dtype == torch.float32:
        there = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    else:
        there = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return there * sum(weight.numel() for weight in weights) * dtype.itemsize


def _packs(student: Student) -> bool:
    """Whether large matrices get a copy in the processor's order."""
    size = packed_bytes(student)
    return size > 0 and _fits(size, student.device, "lay out the matrices for this processor")


def _fits(size: int, device: torch.device, purpose: str) -> bool:
    """Whether a copy of that many bytes fits; where it does not, that is said."""
    free = free_bytes(device)
    if free is None or size <= SHARE_OF_FREE_MEMORY * free:
        return True
    log.warning(
        "rollout: decoding stays slower than it could be: to %s takes %.1f GB while sampling, and %.1f GB are free "
        "(at most half of it is taken)", purpose, size / 1e9, free / 1e9,
    )  # fmt: skip
    return False


def free_bytes(device: torch.device) -> int | None:
    """Memory that new tensors on a device can have; None where that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(found.split()[1]) * 1024
