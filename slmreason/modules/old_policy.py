"""The student as it was a few optimizer steps ago, for losses that stay near it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slmreason.student import Student
from slmreason.student.packing import PackedBatch
from slmreason.student.reference import FrozenWeights


class OldWeights(FrozenWeights):
    """A copy of what is trained alone: with LoRA the adapters."""

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in super()._parameters() if parameter.requires_grad]


class OldPolicy:
    """Keeps the weights with which the newest group of `steps` optimizer steps began."""

    def __init__(self, student: Student, steps: int) -> None:
        self._student, self._steps = student, steps
        self._weights: OldWeights | None = None
        self._taken_at = self._now = 0
        self._restored: dict[str, Tensor] | None = None

    def begin(self, step: int) -> None:
        """Takes the present weights if it is time to; before each micro-batch of optimizer step `step`."""
        self._now = step
        if self._restored is not None:
            self._put_back(self._restored)
            self._restored = None
        if self._weights is None or step >= self._taken_at + self._steps:
            self._weights, self._taken_at = OldWeights(self._student.network), step

    def log_probs(self, batch: PackedBatch) -> Tensor | None:
        """Under the old policy, without gradient and dropout. [N]; None where it is the present one."""
        if self._weights is None or self._now == self._taken_at:
            return None
        self._weights.swap()
        try:
            with torch.no_grad(), self._student.evaluating():
                return self._student.score(batch).log_probs
        finally:
            self._weights.swap()

    def state_dict(self) -> dict[str, Any]:
        """Every process must ask for it in step: shards are gathered."""
        if self._weights is None:
            return {"taken_at": self._taken_at, "weights": self._restored}
        self._weights.swap()
        try:
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in self._student.trained.state()}
        finally:
            self._weights.swap()
        return {"taken_at": self._taken_at, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._taken_at, self._restored = state["taken_at"], state["weights"]

    def _put_back(self, state: dict[str, Tensor]) -> None:
        self._weights = OldWeights(self._student.network)
        self._weights.swap()
        try:
            self._student.trained.load(state, "checkpoint")
        finally:
            self._weights.swap()
