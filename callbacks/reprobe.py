"""SFT and CFT make no rollouts of their own, so the student is sampled again at the end of each of their epochs."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import Callback


class Reprobe(Callback):
    """Calls `probe(epoch)` before each epoch boundary, so that the strata drawn there are those of the student now.

    Lightning builds the next epoch's dataloader before `on_train_epoch_start`; evidence must be in by
    `on_train_epoch_end`.
    """

    def __init__(self, probe: Callable[[int], None]) -> None:
        self.probe = probe

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.probe(trainer.current_epoch)
