"""The weights of a network that may be sharded (FSDP2) and may carry LoRA adapters: sharding, gathering, merging."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from slmreason.student.lora import has_variant
from slmreason.student.quantization import dequantized, is_quantized


def units(network: nn.Module) -> list[FSDPModule]:
    """What is sharded as one piece, the network's rest first, then its blocks; empty when nothing is sharded."""
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def shard(network: nn.Module, base: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Spreads the weights over the processes of `mesh`: a unit for each block, and one for the rest.

    Consecutive fits share one network, so asking again does nothing.

    Args:
        base: The transformers model in `network`, which says what its blocks are.

    Raises:
        ValueError: it does not, or no module is such a block, or its weights are quantized.
    """
    if units(network):
        return
    if any(is_quantized(module) for module in network.modules()):
        raise ValueError("trainer.strategy: student.quantization does not go with sharded weights; use ddp")
    names = base._no_split_modules or ()
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"trainer.strategy: {type(network).__name__} names no blocks to shard by")
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh)


@contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """Within it every process holds all weights, so forward passes without gradient need no lockstep."""
    sharded = units(network)
    for unit in sharded:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in sharded:
            unit.set_reshard_after_forward(unit is not sharded[0], recurse=False)
            unit.reshard()


@torch.no_grad()
def merged(network: nn.Module, base: nn.Module, with_adapters: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Each weight of `base` by name, the adapters in `network` folded in or left out, tied weights once.

    What is sharded is gathered a unit at a time: every process must run through it in step, and a tensor is good only
    until the next is asked for.
    """
    names = {module: name for name, module in base.named_modules()}
    seen: set[int] = set()
    pieces: Sequence[Any] = units(network) or [network]
    for unit in pieces:
        with _gathered(unit):
            for module in _own_modules(unit):
                for name, tensor in _own_weights(module, with_adapters):
                    if module not in names or id(tensor) in seen:
                        continue
                    if isinstance(tensor, nn.Parameter):  # only these live on, so only their ids stay theirs
                        seen.add(id(tensor))
                    yield f"{names[module]}.{name}".removeprefix("."), tensor


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor as `parameter` has it: on its device, and this process's shard of it if that is sharded."""
    moved = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return moved
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local_part(parameter: Tensor) -> Tensor:
    """What this process has of a parameter: its shard, or all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Within it the weights that `module` itself has sharded are whole."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """The modules of a unit: its tree without the units inside it and without what lies within a LoRA layer."""
    from peft.tuners.lora import LoraLayer  # slow to import, and most commands do without

    yield unit
    if not isinstance(unit, LoraLayer):
        for child in unit.children():
            if not isinstance(child, FSDPModule):
                yield from _own_modules(child)


def _own_weights(module: nn.Module, with_adapters: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of one module alone; of a LoRA layer its base's, the update added or not."""
    from peft.tuners.lora import LoraLayer  # slow to import, and most commands do without

    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(module, LoraLayer) and with_adapters and has_variant(module):
        yield from _merged_by_peft(module)
        return
    for name, tensor in (*base.named_parameters(recurse=False), *base.named_buffers(recurse=False)):
        if name in base._non_persistent_buffers_set:
            continue
        if name == "weight" and is_quantized(base):
            tensor = dequantized(base)
        if isinstance(module, LoraLayer) and name == "weight" and with_adapters:
            whole = tensor.to(torch.promote_types(tensor.dtype, torch.float32))  # rounded once, at the end
            for adapter in module.active_adapters:  # type: ignore[attr-defined]
                whole = whole + module.get_delta_weight(adapter).to(whole.dtype)  # type: ignore[operator]
            tensor = whole.to(tensor.dtype)
        yield name, tensor


def _merged_by_peft(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights of one LoRA layer's base with its adapters as peft merges them, rounded once, at the end."""
    dtypes = {name: tensor.dtype for name, tensor in layer.get_base_layer().named_parameters(recurse=False)}
    whole = copy.deepcopy(layer)
    whole.get_base_layer().to(torch.float32)
    whole.merge(safe_merge=False)
    for name, tensor in whole.get_base_layer().named_parameters(recurse=False):
        yield name, tensor.detach().to(dtypes[name])
