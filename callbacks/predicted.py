"""How well rho is predicted from traces, for whoever looks at the metrics of a fit."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback

from slmreason.data.ledger import Ledger


class LogPrediction(Callback):
    """Logs `predictor/...` when an epoch begins, for the evidence as it is then; nothing where no trace is scored."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        predicted = self.ledger.predicted
        if predicted is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        metrics = {f"predictor/{name}": value for name, value in predicted.metrics().items()}
        for logger in trainer.loggers:  # not by the module: an epoch that is gone on with has logged it already
            logger.log_metrics(metrics, step=trainer.global_step)
