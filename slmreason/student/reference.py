"""The reference policy, which GRPO's KL term holds the student near: the student as it was before a fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from slmreason.student.lora import Lora
from slmreason.student.weights import like, local_part, units


class ReferencePolicy:
    """With LoRA the base with its adapters off, which is always there; else weights that were frozen.

    Where the adapters' options change the base (PiSSA, trained biases) it is the student with what it began with.
    """

    def __init__(self, network: Any, lora: Lora | None) -> None:
        self._network = network
        self._has_adapters = lora is not None
        self._frozen: FrozenWeights | None = None
        self._first = FirstAdapters(network) if lora is not None and lora.changes_base else None

    def freeze(self) -> None:
        """Keeps the present weights as the reference policy, until `drop`. Where there is one already, it stays.

        With LoRA there always is one, and nothing is copied.
        """
        if self._frozen is None and not self._has_adapters:
            self._frozen = FrozenWeights(self._network)

    def drop(self) -> None:
        """Lets the frozen weights go."""
        self._frozen = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Within it the student's scores are those of the reference policy.

        Raises:
            RuntimeError: full fine-tuning without `freeze()` first.
        """
        if self._first is not None:
            with self._first.in_place():
                yield
            return
        if self._has_adapters:
            with self._network.disable_adapter():
                yield
            return
        frozen = self._frozen
        if frozen is None:
            raise RuntimeError("no reference policy: call reference_policy.freeze() before training starts")
        frozen.swap()
        try:
            yield
        finally:
            frozen.swap()


class FirstAdapters:
    """What is trained beside frozen weights, as it was when the student was made."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        trained = ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)
        self._first = {name: parameter.detach().clone() for name, parameter in trained}

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Within it the network computes with them; afterwards with what it has learned, bit for bit."""
        for unit in units(self._network):
            unit.reshard()
        parameters = {name: p for name, p in self._network.named_parameters() if name in self._first}
        learned = {name: local_part(parameter).detach().clone() for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                first = like(parameter, self._first[name])
                local_part(parameter).data.copy_(local_part(first))
            yield
        finally:
            for unit in units(self._network):
                unit.reshard()
            for name, parameter in parameters.items():
                local_part(parameter).data.copy_(learned[name])


class FrozenWeights:
    """A copy of a network's weights, each process's shards alone, that can change places with the present ones."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._frozen = [local_part(parameter).detach().clone() for parameter in self._parameters()]

    def swap(self) -> None:
        """Exchanges the two: no second network, and no copy unless the weights are sharded."""
        for index, parameter in enumerate(self._parameters()):
            frozen = self._frozen[index]
            if isinstance(parameter, DTensor):  # FSDP keeps views of its shards, so they must stay where they are
                local = local_part(parameter).data
                self._frozen[index] = local.clone()
                local.copy_(frozen)
            else:
                parameter.data, self._frozen[index] = frozen, parameter.data

    def _parameters(self) -> list[nn.Parameter]:
        """Every parameter, as shards if there are any: FSDP leaves one unit whole after a forward pass."""
        for unit in units(self._network):
            unit.reshard()
        return list(self._network.parameters())
