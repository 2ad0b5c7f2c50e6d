"""Optimizers by class path in place of AdamW: PyTorch's, bitsandbytes', or anyone's.

Weights of half precision keep their float32 copies whatever the class is (see `slmreason.student.optimizer`): the
optimizer works on the copies, and the weights are the copies rounded. A class that takes matrices alone (Muon) gets
the matrices but the embeddings, and AdamW has the rest.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from slmreason.student.optimizer import HALF, MASTER

OWN = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Arguments that are keys of the stage themselves."""
BITSANDBYTES = "bitsandbytes"


@dataclass(frozen=True)
class ByClass:
    """An optimizer's class with its arguments, tried."""

    key: str
    """The config key that names it."""
    cls: type[Optimizer]
    init_args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, key: str, given: str | Mapping[str, Any], weight_decay: float) -> ByClass:
        """Reads what a config says, and tries it on two small weights.

        Args:
            given: a class path, or {class_path, init_args}.

        Raises:
            ValueError: there is no such class, it is no optimizer, or it cannot be made or used; the message names
                the key.
        """
        said: Mapping[str, Any] = {"class_path": given} if isinstance(given, str) else given
        if "class_path" not in said or said.keys() - {"class_path", "init_args"}:
            raise ValueError(f"{key}: needs a class path, or class_path and init_args; got {given}")
        path, init_args = str(said["class_path"]), dict(said.get("init_args") or {})
        found = cls(key, _class_at(key, path), init_args)
        stage = key.partition(".")[0]
        for name in ("params", *OWN):
            if name in init_args:
                instead = f"write {stage}.{OWN[name]} in its place" if name in OWN else "it is what is trained"
                raise ValueError(f"{key}.init_args.{name}: {instead}")
        if weight_decay > 0 and not found.decays:
            raise ValueError(f"{stage}.weight_decay: {weight_decay} does nothing with {path}, which takes none")
        found._try()
        return found

    @property
    def decays(self) -> bool:
        """Whether the class takes a weight decay."""
        return "weight_decay" in inspect.signature(self.cls).parameters

    @property
    def takes_vectors(self) -> bool:
        """Whether it can be made for parameters that are no matrices, found by trying."""
        vector = nn.Parameter(torch.zeros(4))
        try:
            self.make([{"params": [vector]}], 1e-3)
        except ValueError:
            return False
        return True

    def make(self, groups: list[dict[str, Any]], learning_rate: float) -> Optimizer:
        """The optimizer of some groups of parameters; without a weight decay of their own they have none."""
        arguments: dict[str, Any] = {"lr": learning_rate, **self.init_args}
        if self.decays:
            arguments["weight_decay"] = 0.0
        return self.cls(groups, **arguments)

    def _try(self) -> None:
        """
        Raises:
            ValueError: it cannot be made, or does not take a step.
        """
        name = f"{self.cls.__module__}.{self.cls.__qualname__}"
        on_gpu = self.cls.__module__.partition(".")[0] == BITSANDBYTES
        if on_gpu and not torch.cuda.is_available():
            raise ValueError(f"{self.key}: {name} works on a GPU, and there is none here")
        matrix = nn.Parameter(torch.ones(4, 4, device="cuda" if on_gpu else "cpu"))
        matrix.grad = torch.ones_like(matrix)
        try:
            self.make([{"params": [matrix]}], 1e-3).step()
        except Exception as error:  # whatever a class of anyone's does with arguments it was not made for
            fault = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self.key}: {name} cannot be made or used: {fault}") from error


def _class_at(key: str, path: str) -> type[Optimizer]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        extra = '; pip install "slmreason[quantization]"' if path.startswith(BITSANDBYTES) else ""
        raise ValueError(f"{key}: {path} cannot be imported ({error}){extra}") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"{key}: {path} is no torch.optim.Optimizer")
    return found


def make_by_class(
    chosen: ByClass,
    parameters: Sequence[Tensor],
    learning_rate: float,
    weight_decay: float,
    embeddings: Sequence[Tensor] = (),
    masters: Mapping[Tensor, Tensor] | None = None,
) -> Optimizer:
    """The chosen optimizer on all parameters; norms, biases and other vectors are not decayed.

    Args:
        embeddings: parameters that an optimizer of matrices leaves to AdamW.
        masters: float32 copies of parameters that an earlier fit has left; they are updated in place.

    Raises:
        ValueError: the parameters are sharded.
    """
    if any(isinstance(p, DTensor) for p in parameters):
        raise ValueError(f"{chosen.key}: does not go with sharded weights; leave it out, or use trainer.strategy ddp")
    given = masters or {}
    copies = {p: given[p] if p in given else p.detach().float() for p in parameters if p.dtype in HALF}
    worked_on = {p: copies.get(p, p) for p in parameters}
    mine = list(parameters)
    if not chosen.takes_vectors:
        apart = {id(p) for p in embeddings}
        mine = [p for p in parameters if p.ndim == 2 and id(p) not in apart]
    ids = {id(p) for p in mine}
    others = [p for p in parameters if id(p) not in ids]
    parts: list[tuple[Optimizer, list[Tensor]]] = []
    for part, make, decays in ((mine, chosen.make, chosen.decays), (others, _adamw, True)):
        if part:
            groups = _groups(part, weight_decay) if decays else [{"params": part}]
            order = [p for group in groups for p in group["params"]]
            made = make([{**group, "params": [worked_on[p] for p in group["params"]]} for group in groups],
                        learning_rate)  # fmt: skip
            parts.append((made, order))
    optimizer = parts[0][0] if len(parts) == 1 and not copies else OnCopies(parts, copies)
    # The scaler of 16-mixed divides beforehand, so that whoever looks at the gradient sees it as it is.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _adamw(groups: list[dict[str, Any]], learning_rate: float) -> Optimizer:
    return torch.optim.AdamW(groups, lr=learning_rate)


def _groups(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class OnCopies(Optimizer):
    """Several optimizers as one, which work on float32 copies of what is in half precision.

    Its groups are theirs, in order, with the weights themselves in place of the copies.
    """

    def __init__(self, parts: Sequence[tuple[Optimizer, list[Tensor]]], masters: Mapping[Tensor, Tensor]) -> None:
        """
        Args:
            parts: each optimizer with the weights that its parameters stand for, in the order of its groups.
            masters: float32 copy of each weight in half precision.
        """
        self.masters = dict(masters)
        self._parts = list(parts)
        self.inner = [optimizer for optimizer, _ in parts]
        groups = []
        for optimizer, weights in parts:
            rest = iter(weights)
            groups += [{**group, "params": [next(rest) for _ in group["params"]]} for group in optimizer.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, master in self.masters.items():
            master.grad = None if weight.grad is None else weight.grad.to(master.dtype)
        self._tell_settings()
        for optimizer, _ in self._parts:
            optimizer.step()
        for weight, master in self.masters.items():
            if master.grad is not None:
                weight.copy_(master)
                master.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of one optimizer; each weight's state has its copy too."""
        whole: dict[str, Any] = {"state": {}, "param_groups": []}
        self._tell_settings()
        first = 0
        for optimizer, weights in self._parts:
            part = optimizer.state_dict()
            whole["state"] |= {first + index: dict(state) for index, state in part["state"].items()}
            for group in part["param_groups"]:
                whole["param_groups"].append({**group, "params": [first + index for index in group["params"]]})
            for index, weight in enumerate(weights, start=first):
                if weight in self.masters:
                    whole["state"].setdefault(index, {})[MASTER] = self.masters[weight]
            first += len(weights)
        return whole

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; the weights are made anew from their copies."""
        first, groups = 0, list(state_dict["param_groups"])
        for optimizer, weights in self._parts:
            mine, groups = groups[: len(optimizer.param_groups)], groups[len(optimizer.param_groups) :]
            states: dict[int, Any] = {}
            for index, weight in enumerate(weights):
                saved = dict(state_dict["state"].get(first + index, {}))
                if (master := saved.pop(MASTER, None)) is not None and weight in self.masters:
                    self.masters[weight].copy_(master)
                    weight.copy_(self.masters[weight])
                if saved:
                    states[index] = saved
            moved = [{**group, "params": [index - first for index in group["params"]]} for group in mine]
            optimizer.load_state_dict({"state": states, "param_groups": moved})
            first += len(weights)
        inner = [group for optimizer, _ in self._parts for group in optimizer.param_groups]
        for outer, group in zip(self.param_groups, inner, strict=True):
            outer.update({name: value for name, value in group.items() if name != "params"})

    def _tell_settings(self) -> None:
        """Hands on what a schedule has set."""
        inner = [group for optimizer, _ in self._parts for group in optimizer.param_groups]
        for outer, group in zip(self.param_groups, inner, strict=True):
            group.update({name: value for name, value in outer.items() if name != "params"})
