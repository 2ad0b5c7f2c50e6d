"""The weights of a network that may be sharded (FSDP2) and may carry LoRA adapters: sharding, gathering, merging."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from slmreason.student.optimizer import HALF


def units(network: nn.Module) -> list[FSDPModule]:
    """What is sharded as one piece, the network's rest first, then its blocks; empty when nothing is sharded."""
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def shard(network: nn.Module, block_names: Collection[str], mesh: DeviceMesh) -> None:
    """Spreads the weights over the processes of `mesh`: a unit for each block, and one for the rest.

    Consecutive fits share one network, so asking again does nothing.

    Raises:
        ValueError: no module is of a class in `block_names`.
    """
    if units(network):
        return
    blocks = [module for module in network.modules() if type(module).__name__ in block_names]
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


class MasterWeights:
    """Float32 copies that a fit has left of weights in half precision; the next fit goes on from them.

    A weight that was changed since by something else has none.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._kept: dict[str, Tensor] = {}
        """By parameter name; not by parameter, since sharding makes other parameters."""

    def keep(self, masters: Mapping[Tensor, Tensor]) -> None:
        """Puts away copies, by parameter."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._network.named_parameters()}
        self._kept |= {names[parameter]: master for parameter, master in masters.items()}

    def take(self) -> dict[Tensor, Tensor]:
        """All copies by parameter, for an optimizer to go on from; there are none here then."""
        taken: dict[Tensor, Tensor] = {
            p: kept for name, p in self._network.named_parameters() if (kept := self.of(name, p)) is not None
        }
        self._kept.clear()
        return taken

    def of(self, name: str, parameter: Tensor) -> Tensor | None:
        """The copy of a parameter, sharded as it is."""
        kept = self._kept.get(name)
        if kept is None:
            return None
        if isinstance(parameter, DTensor) and not isinstance(kept, DTensor):  # it was sharded since
            kept = like(parameter, kept)
        mine = _local(parameter.detach())
        return kept if torch.equal(_local(kept).to(mine.device, mine.dtype), mine) else None


@torch.no_grad()
def trainable(network: nn.Module, masters: MasterWeights) -> Iterator[tuple[str, Tensor]]:
    """What training changes, by parameter name: the float32 copies of what has some, else the parameters themselves.

    Shards are gathered one parameter at a time, in step.
    """
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            kept = masters.of(name, parameter)
            tensor = parameter if kept is None else kept
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put_trainable(network: nn.Module, masters: MasterWeights, state: Mapping[str, Tensor]) -> None:
    """Puts back what `trainable` gave: all of it."""
    copies: dict[Tensor, Tensor] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            value = like(parameter, state[name])
            parameter.copy_(value)
            if parameter.dtype in HALF and value.dtype == torch.float32:
                copies[parameter] = value.clone()
    masters.keep(copies)


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor as `parameter` has it: on its device, and this process's shard of it if that is sharded."""
    moved = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return moved
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


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


class FrozenWeights:
    """A copy of a network's weights, each process's shards alone, that can change places with the present ones."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._frozen = [_local(parameter).detach().clone() for parameter in self._parameters()]

    def swap(self) -> None:
        """Exchanges the two: no second network, and no copy unless the weights are sharded."""
        for index, parameter in enumerate(self._parameters()):
            frozen = self._frozen[index]
            if isinstance(parameter, DTensor):  # FSDP keeps views of its shards, so they must stay where they are
                local = _local(parameter).data
                self._frozen[index] = local.clone()
                local.copy_(frozen)
            else:
                parameter.data, self._frozen[index] = frozen, parameter.data

    def _parameters(self) -> list[nn.Parameter]:
        """Every parameter, as shards if there are any: FSDP leaves one unit whole after a forward pass."""
        for unit in units(self._network):
            unit.reshard()
        return list(self._network.parameters())


def _local(parameter: Tensor) -> Tensor:
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
    for name, tensor in (*base.named_parameters(recurse=False), *base.named_buffers(recurse=False)):
        if name in base._non_persistent_buffers_set:
            continue
        if isinstance(module, LoraLayer) and name == "weight" and with_adapters:
            whole = tensor.to(torch.promote_types(tensor.dtype, torch.float32))  # rounded once, at the end
            for adapter in module.active_adapters:  # type: ignore[attr-defined]
                whole = whole + module.get_delta_weight(adapter).to(whole.dtype)  # type: ignore[operator]
            tensor = whole.to(tensor.dtype)
        yield name, tensor
