"""How far the student has gone from the base by the end of a fit."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import Callback

from slmreason.runtime.lightning_internals import logging_step


class LogDivergence(Callback):
    """Gives every logger `val/kl` when a fit has come to its end: KL(base || student) on held-out problems."""

    def __init__(self, measure: Callable[[], float]) -> None:
        self.measure = measure

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        divergence = self.measure()
        for logger in trainer.loggers:
            logger.log_metrics({"val/kl": divergence}, step=logging_step(trainer))
