"""Progress in the curriculum's own words: Lightning's bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from slmreason.modules.base import StudentModule
from slmreason.modules.grpo import GRPOModule
from slmreason.records import Place
from slmreason.run.progress import Lines, Pace, Watch, duration
from slmreason.runtime.lightning_internals import HeadedProgressBar


class StageProgressBar(HeadedProgressBar):
    """Lightning's rich bar, headed by round and stage; none where the output is not a terminal."""

    def __init__(self, place: Place, rounds: int, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate if Console().is_terminal else 0)
        self.place, self.rounds = place, rounds

    def heading(self, current_epoch: int) -> str:
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


class StageLines(Callback):
    """Where the output is not a terminal: a line every half minute that a fit lasts.

    GRPO counts rollouts, since a step of it may take minutes; SFT and CFT count steps.
    """

    def __init__(self, label: str, pace: Pace | None = None) -> None:
        """
        Args:
            label: of the round and stage.
            pace: of the run.
        """
        self.label, self.pace = label, pace
        self._lines = Lines()
        self._trained_before = 0
        self._steps_before: int | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._steps_before is not None:  # the number of batches is known only when the first epoch begins
            return
        self._lines, self._steps_before = Lines(), self._done(trainer)
        assert isinstance(pl_module, StudentModule)
        self._trained_before = pl_module.student.tokens.trained
        if isinstance(pl_module, GRPOModule):
            settings = pl_module.settings
            a_step = settings.prompts_per_step * settings.group_size
            watch = Watch(self.label, self._total(trainer) * a_step, settings.max_completion_tokens, self.pace)
            watch.skip(self._steps_before * a_step)
            if self.pace is not None:
                self.pace.ahead = max(0, self.pace.ahead - watch.total)
            pl_module.rollout_watch = watch

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(pl_module, StudentModule) and not isinstance(pl_module, GRPOModule):
            self._lines.say(lambda: self._line(trainer, pl_module))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, GRPOModule) and pl_module.rollout_watch is not None:
            if self.pace is not None:
                self.pace.add(pl_module.rollout_watch)
            pl_module.rollout_watch = None

    def _line(self, trainer: L.Trainer, module: StudentModule) -> str:
        done, total, before = self._done(trainer), self._total(trainer), self._steps_before or 0
        seconds = self._lines.seconds
        tokens = module.student.tokens.trained - self._trained_before
        said = [f"step {done} of {total}", f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}",
                f"{tokens / seconds:,.0f} tokens/s"]  # fmt: skip
        if done > before:
            said.append(f"about {duration((total - done) * seconds / (done - before))} left")
        return f"{self.label}: {', '.join(said)}"

    @staticmethod
    def _done(trainer: L.Trainer) -> int:
        """Batches of this fit that are done, as if every epoch had as many as the present one."""
        inside = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        return int(trainer.current_epoch * trainer.num_training_batches + inside)

    @staticmethod
    def _total(trainer: L.Trainer) -> int:
        return int((trainer.max_epochs or 1) * trainer.num_training_batches)
