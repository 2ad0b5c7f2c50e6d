"""Checkpoints within a fit, between two optimizer steps, from which a run that was cut off goes on bit by bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, Timer

from slmreason.rollout.engine import stable_seed
from slmreason.runtime import preemption
from slmreason.runtime.distributed import first_only, rank
from slmreason.runtime.lightning_internals import logged_metrics, logging_step, set_logging_step


class SeedSteps(Callback):
    """Seeds every generator before each batch by its place in the run: no step depends on who drew what before it."""

    def __init__(self, *key: object) -> None:
        self.key = key

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed = stable_seed(*self.key, trainer.current_epoch, batch_idx, rank()) % 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


class OutOfTime(Exception):
    """The run's time is used up in the middle of a fit, which has been saved."""


class KeepCheckpoints(Checkpoint):
    """Saves before a batch that begins an optimizer step, when it is due; on SIGTERM or out of time it leaves too."""

    def __init__(
        self,
        path: Callable[[str], Path],
        state: Callable[[int], dict[str, Any]],
        saved: Callable[[], object],
        every_n_steps: int | None,
        every_minutes: float | None,
        deadline: float | None = None,
    ) -> None:
        """
        Args:
            path: the file of the next checkpoint, given what tells it from others.
            state: what is kept of the run beside the fit, given the epoch.
            saved: called when a checkpoint is on the disk.
            every_n_steps: optimizer steps between two checkpoints.
            every_minutes: minutes between two checkpoints.
            deadline: of the monotonic clock, in seconds; the first step that would begin later is not begun.
        """
        self._path, self._state, self._saved = path, state, saved
        self.every_n_steps, self.every_minutes, self.deadline = every_n_steps, every_minutes, deadline
        self._steps, self._last = 0, time.monotonic()
        self._sums: dict[str, tuple[Any, Any]] = {}
        self._logged_at: int | None = None
        """Where the loggers stand before the first batch of a fit, or of one that goes on."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        preemption.listen()  # Lightning's handler talks to the other processes from within, wherever they are
        self._logged_at = logging_step(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._logged_at is not None:
            # Lightning counts a step more where it goes on at a batch before which it has validated.
            set_logging_step(trainer, self._logged_at)
            self._logged_at = None
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients that are summed up so far are no part of a checkpoint
        save, leave, late = first_only(lambda: (self._due(), preemption.requested(), self._late()))
        if save or leave or late:
            name = f"{pl_module.stage}-epoch-{trainer.current_epoch + 1}-batch-{batch_idx}"
            with _before_batch(trainer):
                trainer.save_checkpoint(first_only(lambda: self._path(name)))
            self._saved()
            self._steps, self._last = 0, time.monotonic()
        if leave:
            raise SystemExit(preemption.EXIT_STATUS)
        if late:
            raise OutOfTime
        self._steps += 1

    def _due(self) -> bool:
        waited = time.monotonic() - self._last
        return bool(
            (self.every_n_steps and self._steps >= self.every_n_steps)
            or (self._steps and self.every_minutes and waited >= 60 * self.every_minutes)
        )

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()  # what it has not written yet would be lost
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer):
                checkpoint["callbacks"].pop(callback.state_key, None)  # the run's own clock counts
        checkpoint["run"] = self._state(trainer.current_epoch)

    # Means over an epoch are sums that Lightning keeps in memory alone.

    def state_dict(self) -> dict[str, Any]:
        return {"epoch_sums": self._epoch_sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums = dict(state_dict["epoch_sums"])

    @property
    def _epoch_sums(self) -> dict[str, tuple[Any, Any]]:
        return {name: (float(metric.value), _weight(metric)) for name, metric in _means_and_sums(self._results)}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._results = logged_metrics(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, metric in _means_and_sums(self._results) if self._sums else ():
            value, weight = self._sums.pop(name, (0.0, 0))
            metric.value = metric.value + value
            if metric.meta.is_mean_reduction:
                metric.cumulated_batch_size = metric.cumulated_batch_size + weight

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums = {}


def _means_and_sums(results: Any) -> list[tuple[str, Any]]:
    return [
        (name, metric)
        for name, metric in results.items()
        if metric.is_tensor and metric.meta.on_epoch and (metric.meta.is_mean_reduction or metric.meta.is_sum_reduction)
        and metric.update_called
    ]  # fmt: skip


def _weight(metric: Any) -> int:
    return int(metric.cumulated_batch_size) if metric.meta.is_mean_reduction else 0


@contextmanager
def _before_batch(trainer: L.Trainer) -> Iterator[None]:
    """The loop's counters as they were before the batch at hand was fetched, so that a new loop begins with it."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    was_last, progress.is_last_batch = progress.is_last_batch, False
    progress.current.ready -= 1
    progress.total.ready -= 1
    try:
        yield
    finally:
        progress.is_last_batch = was_last
        progress.current.ready += 1
        progress.total.ready += 1
