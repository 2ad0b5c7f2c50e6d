"""Activations in the CPU's memory between the forward and the backward pass, by PyTorch's own hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


class OffloadedActivations(saved_tensors_hooks):
    """Within it what the backward pass will need is kept on the CPU, but for the weights, which stay where they are."""

    def __init__(self, network: nn.Module) -> None:
        library = save_on_cpu(pin_memory=torch.cuda.is_available())
        # Under FSDP a unit's whole weights are other tensors than the network's, and go over too.
        weights = {_place(parameter) for parameter in network.parameters()}

        def pack(tensor: Tensor) -> Any:
            return tensor.detach() if _place(tensor) in weights else library.pack_hook(tensor)

        def unpack(packed: Any) -> Tensor:
            whole: Tensor = packed if isinstance(packed, Tensor) else library.unpack_hook(packed)
            return whole

        super().__init__(pack, unpack)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
