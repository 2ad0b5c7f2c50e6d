"""Measures where a run's tokens pass a budget, within a fit: between two optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class MeasureAtBudgets(Callback):
    """Calls `measure()` before and after each optimizer step; that looks whether a budget has been passed.

    After a step, for what the step took; before one, for what was taken between two epochs.
    """

    def __init__(self, measure: Callable[[], None]) -> None:
        self.measure = measure

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.measure()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self.measure()
