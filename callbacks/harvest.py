"""All-zero groups carry no gradient, but they are not thrown away: they feed the Critique Set of the next fit."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from slmreason.data.ledger import Ledger
from slmreason.records import Place


class HarvestAllZeroGroups(Callback):
    """Keeps each group of a training batch whose rollouts all failed, with its attempts."""

    def __init__(self, ledger: Ledger, place: Place) -> None:
        self.ledger, self.place = ledger, place

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        failed = [group for group in outputs["rollout_groups"] if group.all_zero]
        self.ledger.harvest(failed, Place(self.place.round, self.place.stage, trainer.current_epoch))
