"""Every private name of Lightning that we read, change or override. Seen in Lightning 2.6.6.

One function or class for each need, which says why there is no public way. No other file knows such a name, so that a
release of Lightning that renames one breaks this file alone, and its tests say which name is gone.
"""

from __future__ import annotations

import os
import subprocess
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher, subprocess_script

# -- a fit ----------------------------------------------------------------------------------------------------------


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """The Trainer that a module is attached to, if there is one.

    Where there is none, the public `trainer` raises a RuntimeError, which cannot be told from others.
    """
    return module._trainer


def logged_metrics(trainer: L.Trainer) -> Mapping[str, Any]:
    """What the training loop has logged in this epoch: key -> the metric that sums it up.

    Such a metric has its settings in `meta` (`fx`, `on_epoch`, `is_mean_reduction`, `is_sum_reduction`), and its sums
    in `value` and `cumulated_batch_size`. The public `callback_metrics` are finished numbers: with those a mean cannot
    be gone on with, and nothing can be reset.
    """
    return trainer.fit_loop.epoch_loop._results


def logging_step(trainer: L.Trainer) -> int:
    """The step at which Lightning gives the present batch's metrics to the loggers.

    The public `global_step` counts optimizer steps, and has moved on by the time that a batch ends.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logging_step(trainer: L.Trainer, step: int) -> None:
    """Puts right the step that `logging_step` gives: nothing public does."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


# -- callbacks ------------------------------------------------------------------------------------------------------


def waits_for_validation(stopping: EarlyStopping) -> bool:
    """Whether it was told not to look when a training epoch ends: it has no public attribute for this argument."""
    return stopping._check_on_train_epoch_end is False


# -- loggers --------------------------------------------------------------------------------------------------------


def rename(logger: CSVLogger | TensorBoardLogger, name: str) -> None:
    """Gives a logger that was made another name: the public `name` is read-only, and a copy would lose its options."""
    logger._name = name


def set_version(logger: CSVLogger | TensorBoardLogger, version: int | str) -> None:
    """Has a logger that was made go on with a version that is there: the public `version` is read-only."""
    logger._version = version


def tensorboard_options(logger: TensorBoardLogger) -> dict[str, Any]:
    """The options that the writer of events will be made with when it is first logged to, to be changed in place."""
    return logger._kwargs


def set_csv_writer(logger: CSVLogger, writer: ExperimentWriter) -> None:
    """Gives a logger that was made the writer of its file; its own deletes a file that is there."""
    logger._experiment = writer


def set_mlflow_run(logger: MLFlowLogger, run_id: str | None = None, name: str | None = None) -> None:
    """Has a logger that was made go on with a run, or give the one that it begins a name, where it has none."""
    logger._run_id = run_id or logger._run_id
    logger._run_name = logger._run_name or name


def wandb_options(logger: WandbLogger) -> dict[str, Any]:
    """The options that W&B will be started with when it is first logged to, to be changed in place.

    The public properties say a few of them, read-only.
    """
    return logger._wandb_init


class AnyWriterCSVLogger(CSVLogger):
    """Lightning's CSV logger with a subclass's writer: its own is made within a property and cannot be handed in."""

    @abstractmethod
    def new_writer(self) -> ExperimentWriter:
        """Called once, when something is first logged."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = self.new_writer()
        return self._experiment


class OpenCSVWriter(ExperimentWriter):
    """Lightning's CSV writer, less what it does to a file that is there: only private methods can change that."""

    @abstractmethod
    def find_file(self) -> None:
        """Called when the writer is made. Lightning's own warns of a file that is there and deletes it."""

    @abstractmethod
    def rewrite(self, fieldnames: list[str]) -> None:
        """Writes the rows of the file anew under more columns."""

    def _check_log_dir_exists(self) -> None:
        self.find_file()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.rewrite(fieldnames)


# -- strategies and processes ---------------------------------------------------------------------------------------


def group_timeout(strategy: DDPStrategy | ModelParallelStrategy) -> timedelta | None:
    """How long an operation of the process group may take: it has no public attribute for this argument."""
    return strategy._timeout


def tensor_parallel_size(strategy: ModelParallelStrategy) -> str | int:
    """Processes that share one tensor, or `auto`: the public mesh is there only once the group is."""
    return strategy._tensor_parallel_size


def starts_by_script(launcher: object) -> bool:
    """Whether a launcher starts the other processes as this one was started, by its command line.

    The others fork or spawn, and the class that tells them apart is private.
    """
    return isinstance(launcher, _SubprocessScriptLauncher)


def started_processes(launcher: object) -> list[subprocess.Popen[Any]]:
    """The processes that a launcher has started by its command line; it is known by its private class alone."""
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


@contextmanager
def patient_observer(patience_s: float) -> Iterator[None]:
    """Within it, a launcher gives the first process some time to end by itself once another one has failed.

    Lightning's own observer kills it at its next look, up to five seconds later: in the middle of saying what became of
    the run, or of giving back what it holds, on a busy machine. Which observer a launcher has is not for others to say.
    """

    class Patient(_ChildProcessObserver):
        def _terminate_all(self) -> None:
            time.sleep(patience_s)  # it is a daemon: where the process ends, so does this
            super()._terminate_all()

    def launch(child_processes: list[subprocess.Popen[Any]]) -> None:
        Patient(main_pid=os.getpid(), child_processes=child_processes).start()

    launchers: Any = subprocess_script
    plain = launchers._launch_process_observer
    launchers._launch_process_observer = launch
    try:
        yield
    finally:
        launchers._launch_process_observer = plain
