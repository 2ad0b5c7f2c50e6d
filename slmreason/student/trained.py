"""What training changes in a student: its trainable parameters, with float32 copies of those in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slmreason.student.optimizer import HALF
from slmreason.student.weights import like, local_part


class TrainedWeights:
    """A network's trainable parameters, which may be sharded, and the float32 copies that a fit has left of them.

    The next fit goes on from the copies. A weight that was changed since by something else has none.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._masters: dict[str, Tensor] = {}
        """By parameter name; not by parameter, since sharding makes other parameters."""

    def parameters(self) -> list[nn.Parameter]:
        return list(self._named().values())

    @torch.no_grad()
    def state(self) -> Iterator[tuple[str, Tensor]]:
        """By parameter name: the float32 copies of what has some, else the parameters themselves.

        Shards are gathered one parameter at a time: every process must run through it in step.
        """
        for name, parameter in self._named().items():
            master = self._master_of(name, parameter)
            tensor = parameter if master is None else master
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Puts back what `state` gave, into shards too.

        Raises:
            ValueError: a name or a shape differs; the message names the first and `source`.
        """
        mine = self._named()
        differing = sorted(mine.keys() ^ state.keys()) or [n for n in mine if mine[n].shape != state[n].shape]
        if differing:
            raise ValueError(f"{source}: not the weights of this student, first at {differing[0]}")
        copies: dict[Tensor, Tensor] = {}
        for name, parameter in mine.items():
            value = like(parameter, state[name])
            parameter.copy_(value)
            if parameter.dtype in HALF and value.dtype == torch.float32:
                copies[parameter] = value.clone()
        self.keep_masters(copies)

    def keep_masters(self, masters: Mapping[Tensor, Tensor]) -> None:
        """Puts away float32 copies, by parameter."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._network.named_parameters()}
        self._masters |= {names[parameter]: master for parameter, master in masters.items()}

    def take_masters(self) -> dict[Tensor, Tensor]:
        """All copies by parameter, for an optimizer to go on from; there are none here then."""
        taken: dict[Tensor, Tensor] = {}
        for name, parameter in self._network.named_parameters():
            master = self._master_of(name, parameter)
            if master is not None:
                taken[parameter] = master
        self._masters.clear()
        return taken

    def _named(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._network.named_parameters() if parameter.requires_grad}

    def _master_of(self, name: str, parameter: Tensor) -> Tensor | None:
        """The copy of a parameter, sharded as it is."""
        master = self._masters.get(name)
        if master is None:
            return None
        if isinstance(parameter, DTensor) and not isinstance(master, DTensor):  # it was sharded since
            master = like(parameter, master)
        mine = local_part(parameter.detach())
        return master if torch.equal(local_part(master).to(mine.device, mine.dtype), mine) else None
