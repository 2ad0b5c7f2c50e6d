"""Progress in the curriculum's own words: round, stage, epoch, then Lightning's bar with its metrics and time left."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

from slmreason.data.ledger import Place


class StageProgressBar(RichProgressBar):
    """Lightning's rich bar, headed by round and stage; none where the output is not a terminal."""

    def __init__(self, place: Place, rounds: int, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate if Console().is_terminal else 0)
        self.place, self.rounds = place, rounds

    def _get_train_description(self, current_epoch: int) -> str:
        return (
            f"round {self.place.round}/{self.rounds} {self.place.stage} "
            f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"
        )

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float]:  # type: ignore[override]
        """Without the version number, and without the per-epoch doubles of per-step metrics."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {
            name.removesuffix("_step").partition("/")[2] or name: value  # type: ignore[misc]
            for name, value in items.items()
            if not name.endswith("_epoch")
        }
