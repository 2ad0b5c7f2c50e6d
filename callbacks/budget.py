"""Ends a fit when the run has cost what it may: compared runs stop at the same number of tokens."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from slmreason.records import Tokens


class TokenBudget(Callback):
    """Stops the fit after the optimizer step at which the run's tokens reach a limit."""

    def __init__(self, tokens: Tokens, limit: int) -> None:
        """
        Args:
            tokens: what the run has cost so far; it grows.
            limit: on their total.
        """
        self.tokens, self.limit, self.began = tokens, limit, tokens.total

    def share_spent(self) -> float:
        """How much of what was left when the fit began has been spent since, within 0 and 1."""
        left = self.limit - self.began
        return min(1.0, (self.tokens.total - self.began) / left) if left > 0 else 1.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.tokens.total >= self.limit:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"began": self.began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.began = state_dict["began"]
