"""The learning rate of each step, for the loggers of a run: Lightning's monitor would put it into `metrics.csv` too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from slmreason.runtime.lightning_internals import logging_step


class LogLearningRate(Callback):
    """Logs `STAGE/learning_rate` where Lightning logs a step: the rate that its newest update was made with."""

    def __init__(self, log: Callable[[dict[str, float]], None]) -> None:
        """
        Args:
            log: gives metrics of the step at hand to the loggers.
        """
        self._log = log
        self._rate: float | None = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rate, self._rate = self._rate, None
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if rate is not None and every and (logging_step(trainer) + 1) % every == 0:
            self._log({f"{pl_module.stage}/learning_rate": rate})
