"""Every rollout of GRPO is evidence of difficulty: it goes to the ledger, for free."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from slmreason.data.ledger import Ledger
from slmreason.records import Place


class RecordRollouts(Callback):
    """Adds each group of a training batch to the ledger, trained on or not."""

    def __init__(self, ledger: Ledger, place: Place) -> None:
        self.ledger, self.place = ledger, place

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        place = Place(self.place.round, self.place.stage, trainer.current_epoch)
        self.ledger.record(outputs["rollout_groups"], place)


def records_into(ledger: Ledger, trainer: L.Trainer) -> bool:
    """Whether a callback of the trainer adds its rollouts to this ledger."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, RecordRollouts) and callback.ledger is ledger for callback in callbacks)
