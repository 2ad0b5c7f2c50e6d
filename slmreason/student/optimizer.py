"""AdamW for weights of any precision: those of half precision have a float32 copy that takes the updates.

bfloat16 keeps 8 bits of a number, so an update below 1/512 of a weight rounds to nothing. At a learning rate of 1e-6
that is the fate of nearly every update, whatever the gradient was. The copies sum up what is too small for the weights,
which are the copies rounded (master weights: Micikevicius et al., 2018, Mixed Precision Training, section 3.1). They
outlive a fit, so that the next one goes on from what the weights cannot show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_step

HALF = (torch.bfloat16, torch.float16)
MASTER = "master_param"
"""Name of the float32 copy in the optimizer's state."""
PIECE = 1 << 27
"""Weights that are updated at once: as many gradients are held in float32, 512 MiB."""


def make_adamw(
    parameters: Sequence[Tensor],
    learning_rate: float,
    weight_decay: float,
    fused: bool | None = None,
    masters: Mapping[Tensor, Tensor] | None = None,
) -> torch.optim.AdamW:
    """AdamW on all parameters; norms, biases and other vectors are not decayed.

    Args:
        masters: float32 copies of parameters that an earlier fit has left (`release`); they are updated in place.
        fused: one kernel for the whole update; if not given, on CUDA. Elsewhere the numbers stay those of PyTorch's
            default.
    """
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    kind = MasterAdamW if any(p.dtype in HALF for p in parameters) else torch.optim.AdamW
    if fused is None and all(p.is_cuda for p in parameters):
        fused = True
    optimizer = kind([group for group in groups if group["params"]], lr=learning_rate, fused=fused)  # type: ignore[arg-type]
    # A fused step could divide by the scale of 16-mixed itself, after whoever clips the gradient or looks at its norm.
    # Both must see the gradient as it is, so the scaler divides beforehand.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    if isinstance(optimizer, MasterAdamW):
        optimizer.given = dict(masters or {})
    return optimizer


def release(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Ends an optimizer's work, and lets its moments go.

    Returns:
        The float32 copy of each weight that has one.
    """
    masters = {parameter: state[MASTER] for parameter, state in optimizer.state.items() if MASTER in state}
    if isinstance(optimizer, MasterAdamW):
        masters |= optimizer.given
    masters |= getattr(optimizer, "masters", {})  # of an optimizer by class path
    for part in (optimizer, *getattr(optimizer, "inner", ())):
        part.state.clear()
    return masters


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose moments and updates are float32 where the weights are not.

    A weight of half precision has a float32 copy in its state: the one that an earlier fit has left, or one that is
    made at its first step. Afterwards it is that copy, rounded. Weights of other precisions are updated as
    `torch.optim.AdamW` does it. Shards (DTensor) have shards of copies. State and copies are float32 in `state_dict`
    too, and stay so when it is loaded.
    """

    given: dict[Tensor, Tensor]
    """Copies that an earlier fit has left, of weights that have not been updated yet."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _pieces([p for p in group["params"] if p.grad is not None]):
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state_of(parameter, bool(group["fused"])) for parameter in parameters]
        masters = [state.get(MASTER, p) for state, p in zip(states, parameters, strict=True)]
        gradients = [p.grad.to(master.dtype) for p, master in zip(parameters, masters, strict=True)]  # type: ignore[union-attr]
        beta1, beta2 = group["betas"]
        adamw_step(
            masters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        for parameter, master in zip(parameters, masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def _state_of(self, parameter: Tensor, fused: bool) -> dict[str, Any]:
        """Moments, the count of steps (on the CPU unless the step is fused) and the copy; made where there are none."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            copy = parameter.detach()
            if parameter.dtype in HALF:
                given = self.given.pop(parameter, None)
                copy = copy.float() if given is None else given.to(parameter.device)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(copy), torch.zeros_like(copy)
            if copy.dtype != parameter.dtype:
                state[MASTER] = copy
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`, which would round everything to the weights' precision.

        The weights are made anew from their copies. A state without copies, of a version before there were any, gets
        them from the weights.
        """
        super().load_state_dict(state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved_ids, parameters, strict=True):
            saved = state_dict["state"].get(index)
            if parameter.dtype not in HALF or not saved:
                continue
            whole = {"exp_avg": saved["exp_avg"], "exp_avg_sq": saved["exp_avg_sq"],
                     MASTER: saved.get(MASTER, parameter.detach())}  # fmt: skip
            for name, tensor in whole.items():
                self.state[parameter][name] = tensor.to(parameter.device, torch.float32, copy=True)
            self.given.pop(parameter, None)
            parameter.copy_(self.state[parameter][MASTER])


def _pieces(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in lists of at most `PIECE` numbers, or of one parameter that has more."""
    piece: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if piece and size + parameter.numel() > PIECE:
            yield piece
            piece, size = [], 0
        piece.append(parameter)
        size += parameter.numel()
    if piece:
        yield piece
