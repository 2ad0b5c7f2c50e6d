"""One fit of the student: the Trainer, the callbacks that every stage has, and the student given back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from slmreason.callbacks import (
    KeepCheckpoints,
    LogLearningRate,
    OutOfTime,
    SeedSteps,
    StageLines,
    StageProgressBar,
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
from slmreason.run.folder import RunFolder
from slmreason.run.progress import Pace
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
    lines: Pace | None
    """Of the run, where lines tell how far a fit is, since there is no terminal for a bar."""

    def run(
        self,
        place: Place,
        module: StudentModule,
        callbacks: Sequence[Callback],
        state: Callable[[int], dict[str, Any]],
        checkpoint: Path | None,
    ) -> None:
        """Fits to the end, from the start or from a checkpoint.

        Args:
            callbacks: of the stage.
            state: epoch -> what the run needs to know to go on from there.

        Raises:
            OutOfTime: trainer.max_time is used up; the fit can be gone on with.
        """
        callbacks = [*self._common(place, state), *self._budget(module), *callbacks]
        folder = self.files.stage(place).path
        # What is left must be measured now: building the set may have taken long.
        trainer = build_trainer(
            self.trainer_config, module, folder, module.settings.epochs, callbacks, self.clock.left(),
            loggers=self.experiment.loggers,
        )  # fmt: skip
        try:
            with self.experiment.fit(trainer), preemption.between_steps():
                trainer.fit(module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        except OutOfTime:
            module.on_fit_end()
            self._take_back(module.student)
            raise
        self._take_back(module.student)

    def _take_back(self, student: Student) -> None:
        """Lightning moves a module to the CPU when its fit is over."""
        student.to(self.device)
        student.eval()

    def _common(self, place: Place, state: Callable[[int], dict[str, Any]]) -> list[Callback]:
        often, run_dir = self.settings.checkpoint, self.files.path
        watch: list[Callback] = [StageProgressBar(place, self.settings.rounds)]
        if self.lines is not None:
            watch.append(StageLines(place.label, self.lines))
        if self.experiment.loggers:
            watch.append(LogLearningRate(self.experiment.log))
        return [
            *watch,
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
