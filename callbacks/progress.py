"""Progress of a fit in the curriculum's own words: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar

from slmreason.modules.base import StudentModule
from slmreason.modules.grpo import GRPOModule
from slmreason.run.bars import Draw, are_shown
from slmreason.run.progress import Watch
from slmreason.run.whole import WholeRun


class StageWatch(Callback):
    """Follows a fit, and tells how far it is: the whole run, a bar, and every half minute the log where there is none.

    GRPO counts rollouts, since a step of it may take minutes; SFT and CFT count the rows that they train on.
    """

    def __init__(
        self, label: str, whole: WholeRun | None = None, rows: int = 0, draw: Draw = lambda share, said: None
    ) -> None:
        """
        Args:
            label: of the round and stage.
            whole: the run that the fit is part of.
            rows: of the first epoch.
            draw: draws the bar.
        """
        self.label, self.whole, self.rows, self.draw = label, whole, rows, draw
        self.watch: Watch | None = None
        """None before the first epoch begins, and after `close`."""
        self.metrics: list[str] = []
        """Said beside the bar."""
        self._trained = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        steps = trainer.current_epoch * _batches(trainer) + batch_idx
        if self.watch is None:  # the number of batches is known only within the first epoch
            assert isinstance(pl_module, StudentModule)
            self._begin(trainer, pl_module, steps)
        self._note(trainer, steps)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        watch = self.watch
        if watch is None:
            return
        assert isinstance(pl_module, StudentModule)
        steps = trainer.current_epoch * _batches(trainer) + batch_idx + 1
        self._note(trainer, steps)
        if isinstance(pl_module, GRPOModule):
            if pl_module.comes_back:  # every step has its refills: as many as those so far
                a_step = (watch.known + watch.completions) / steps
                watch.total = max(watch.known + watch.completions, a_step * _all_batches(trainer))
            watch.settle()
            return
        trained = pl_module.student.tokens.trained
        watch.advance(0, trained - self._trained)
        self._trained = trained
        watch.settle(max(watch.completions, watch.total * steps / _all_batches(trainer) - watch.known))

    def close(self, module: L.LightningModule) -> None:
        """The fit has ended, however that came."""
        if self.watch is not None and self.whole is not None:
            self.whole.end(self.watch, self.watch.wall_seconds)
        if isinstance(module, GRPOModule):
            module.rollout_watch = None
        self.watch = None

    def _begin(self, trainer: L.Trainer, module: StudentModule, steps: int) -> None:
        """
        Args:
            steps: that an earlier process has done.
        """
        each, longest, unit = 1, 0, "rows"
        if isinstance(module, GRPOModule):
            each, longest, unit = module.settings.group_size, module.settings.max_completion_tokens, "rollouts"
        total = self.rows * each * (trainer.max_epochs or 1)
        watch = Watch(self.label, total, longest, self.whole, str(module.stage), self.draw, unit=unit)
        watch.known = total * steps / _all_batches(trainer)
        if isinstance(module, GRPOModule):
            module.rollout_watch = watch
        if self.whole is not None:
            self.whole.begin("fit", watch)
        self.watch, self._trained = watch, module.student.tokens.trained

    def _note(self, trainer: L.Trainer, steps: int) -> None:
        assert self.watch is not None
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs
        counted = [f"step {steps} of {_all_batches(trainer)}", f"epoch {epoch} of {epochs}"]
        self.watch.notes = [*counted, *self.metrics]


class StageProgressBar(ProgressBar):
    """Stands where Lightning's bar would, and has the stage's row say what the module logs for a bar."""

    def __init__(self, watch: StageWatch) -> None:
        """
        Args:
            watch: of the fit.
        """
        super().__init__()
        self.watch, self.is_enabled = watch, True

    def disable(self) -> None:
        self.is_enabled = False

    def enable(self) -> None:
        self.is_enabled = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_enabled and are_shown():
            self.watch.metrics = [f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items()]

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float]:  # type: ignore[override]
        """Without the version number, and without the per-epoch doubles of per-step metrics."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {
            name.removesuffix("_step").partition("/")[2] or name: f"{value:.3g}" if isinstance(value, float) else value
            for name, value in items.items()
            if not name.endswith("_epoch") and not isinstance(value, dict)
        }


def _batches(trainer: L.Trainer) -> int:
    """Of the present epoch: every other is taken to have as many."""
    return max(1, int(trainer.num_training_batches))


def _all_batches(trainer: L.Trainer) -> int:
    return (trainer.max_epochs or 1) * _batches(trainer)
