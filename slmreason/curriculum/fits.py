"""One fit of the student: the Trainer, the callbacks that every stage has, and the student given back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from slmreason.callbacks import (
    KeepCheckpoints,
    LogLearningRate,
    OutOfTime,
    SeedSteps,
    StageProgressBar,
    StageWatch,
    TokenBudget,
    TrainingHealth,
)
from slmreason.curriculum.clock import RunClock
from slmreason.curriculum.experiment import Experiment
from slmreason.curriculum.resume import next_checkpoint, prune
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.curriculum.trainer import FreshConfig, build_trainer
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.base import StudentModule
from slmreason.records import Place
from slmreason.run.bars import hidden, row
from slmreason.run.folder import RunFolder
from slmreason.run.whole import WholeRun
from slmreason.runtime import preemption
from slmreason.runtime.distributed import is_first
from slmreason.student import Student


@dataclass
class Fits:
    """How the fits of a run are done."""

    settings: CurriculumSettings
    data: ReasoningDataModule
    trainer_config: FreshConfig
    device: torch.device
    files: RunFolder
    clock: RunClock
    experiment: Experiment
    seed: int
    whole: WholeRun
    """The run that they are part of, for those who watch it."""
    console: Console
    bar: bool
    """Shown where the console is a terminal."""

    def run(
        self,
        place: Place,
        module: StudentModule,
        callbacks: Sequence[Callback],
        state: Callable[[int], dict[str, Any]],
        checkpoint: Path | None,
        rows: int,
    ) -> None:
        """Fits to the end, from the start or from a checkpoint.

        Args:
            callbacks: of the stage.
            state: epoch -> what the run needs to know to go on from there.
            rows: of the first epoch.

        Raises:
            OutOfTime: trainer.max_time is used up; the fit can be gone on with.
        """
        watch = StageWatch(place.label, self.whole, rows)
        callbacks = [*self._common(place, state, watch), *self._budget(module), *callbacks]
        folder = self.files.stage(place).path
        # What is left must be measured now: building the set may have taken long.
        trainer = build_trainer(
            self.trainer_config, module, folder, module.settings.epochs, callbacks, self.clock.left(),
            loggers=self.experiment.loggers,
        )  # fmt: skip
        try:
            with self.experiment.fit(trainer), preemption.between_steps(), self._shown(watch, trainer, module):
                trainer.fit(module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        except OutOfTime:
            module.on_fit_end()
            self._take_back(module.student)
            raise
        self._take_back(module.student)

    @contextmanager
    def _shown(self, watch: StageWatch, trainer: L.Trainer, module: StudentModule) -> Iterator[None]:
        """The fit has a row of the display, unless another progress bar takes the terminal."""
        bar = trainer.progress_bar_callback
        is_ours = bar is None or isinstance(bar, StageProgressBar)
        with hidden(not is_ours), row(watch.label, self.console, self.bar and is_ours) as watch.draw:
            try:
                yield
            finally:
                watch.close(module)

    def _take_back(self, student: Student) -> None:
        """Lightning moves a module to the CPU when its fit is over."""
        student.to(self.device)
        student.eval()

    def _common(self, place: Place, state: Callable[[int], dict[str, Any]], watch: StageWatch) -> list[Callback]:
        often, run_dir = self.settings.checkpoint, self.files.path
        rates = [LogLearningRate(self.experiment.log)] if self.experiment.loggers else []
        return [
            StageProgressBar(watch),
            watch,
            *rates,
            SeedSteps(self.seed, place.round, place.stage),
            TrainingHealth(),
            KeepCheckpoints(
                path=lambda name: next_checkpoint(run_dir, f"in-round-{place.round}-{name}"),
                state=state,
                saved=lambda: prune(run_dir, often.keep) if is_first() else None,
                every_n_steps=often.every_n_steps,
                every_minutes=often.every_minutes,
                deadline=self.clock.deadline,
            ),
        ]

    def _budget(self, module: StudentModule) -> list[Callback]:
        if self.settings.max_tokens is None:
            return []
        budget = TokenBudget(module.student.tokens, self.settings.max_tokens)
        module.share_spent = budget.share_spent
        return [budget]
