"""The reference policy, which GRPO's KL term holds the student near: the student as it was before a fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from slmreason.student.weights import local_part, units


class ReferencePolicy:
    """With LoRA the base with its adapters off, which is always there; else weights that were frozen."""

    def __init__(self, network: Any, has_adapters: bool) -> None:
        self._network = network
        self._has_adapters = has_adapters
        self._frozen: FrozenWeights | None = None

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
