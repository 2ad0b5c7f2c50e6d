"""Which of a Trainer's flags and callbacks a run of several fits can honour; the others are refused, with what to use.

The batches of a fit are planned before each epoch, one student goes through all fits, and a fit is validated where
there are problems that are held out for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
    WeightAveraging,
)

from slmreason.curriculum.watched import METRICS, NO_VALIDATION, Logged, check_watched
from slmreason.run.folder import checked_folder
from slmreason.run.tree import unsavable
from slmreason.runtime.lightning_internals import waits_for_validation

log = logging.getLogger(__name__)

NO_TEST = """\
the fits have no test or prediction loop; benchmarks are run between the stages (curriculum.evaluate, \
evaluation.limit)"""
TRAINS_NOTHING = "no stage would train anything; `--curriculum.stages []` measures the student as it is"

Treatment = Literal["honoured", "passed on", "with validation", "refused"]
FLAGS: dict[str, Treatment] = {
    "accelerator": "passed on", "strategy": "honoured", "devices": "passed on", "num_nodes": "passed on",
    "precision": "passed on", "logger": "honoured", "callbacks": "honoured", "fast_dev_run": "honoured",
    "max_epochs": "honoured", "min_epochs": "honoured", "max_steps": "honoured", "min_steps": "honoured",
    "max_time": "honoured", "limit_train_batches": "honoured", "limit_val_batches": "with validation",
    "limit_test_batches": "refused", "limit_predict_batches": "refused", "overfit_batches": "refused",
    "val_check_interval": "with validation", "check_val_every_n_epoch": "with validation",
    "num_sanity_val_steps": "with validation", "log_every_n_steps": "honoured", "enable_checkpointing": "honoured",
    "enable_progress_bar": "passed on", "enable_model_summary": "honoured", "accumulate_grad_batches": "honoured",
    "gradient_clip_val": "honoured", "gradient_clip_algorithm": "honoured", "deterministic": "passed on",
    "benchmark": "passed on", "inference_mode": "refused", "use_distributed_sampler": "honoured",
    "profiler": "passed on", "detect_anomaly": "passed on", "barebones": "refused", "plugins": "honoured",
    "sync_batchnorm": "passed on", "reload_dataloaders_every_n_epochs": "refused", "default_root_dir": "refused",
    "enable_autolog_hparams": "passed on", "model_registry": "refused",
}  # fmt: skip
"""Every flag of a Trainer. `passed on`: as it is, to the Trainer of each stage. `honoured`: with the meaning that
docs/config.md tells. `with validation`: refused where there is nothing to validate on. `refused`: but for a value that
asks for nothing."""

REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_epochs": (lambda value: value == 0, TRAINS_NOTHING),
    "max_steps": (lambda value: value == 0, TRAINS_NOTHING),
    "limit_train_batches": (lambda value: value == 0, TRAINS_NOTHING),
    "limit_test_batches": (bool, NO_TEST),
    "limit_predict_batches": (bool, NO_TEST),
    "val_check_interval": (lambda value: value is not None and (not isinstance(value, int | float) or value <= 0),
                           "it is a share of an epoch's batches, or a number of them; by the clock neither several "
                           "processes nor a run that goes on would agree when"),
    "check_val_every_n_epoch": (lambda value: value is not None and value < 1, "it must be at least 1, or null"),
    "inference_mode": (lambda value: value is False, "Lightning validates within a fit without it in any case"),
    "overfit_batches": (bool, "the set is drawn anew at each epoch; a pool of a few problems is data.limit"),
    "barebones": (bool, "it takes away the checkpoints and the metrics that a run consists of"),
    "log_every_n_steps": (lambda value: value is not None and value < 0, "it must not be below 0; 0 logs no step"),
    "accumulate_grad_batches": (lambda value: value < 1, "it must be at least 1"),
    "gradient_clip_val": (lambda value: value is not None and not 0 <= value < math.inf, "it must be a finite number, "
                          "not below 0"),
    "gradient_clip_algorithm": (lambda value: value not in (None, "norm", "value"), "there are norm and value"),
    "reload_dataloaders_every_n_epochs": (lambda value: value not in (0, 1), "the set is drawn anew at every epoch"),
    "default_root_dir": (lambda value: value is not None, "a run writes into run_dir"),
    "model_registry": (lambda value: value is not None, "nothing is uploaded; see slmreason export"),
}  # fmt: skip
"""By flag: whether a value is refused, and why."""

WITH_VALIDATION: dict[str, Callable[[Any], bool]] = {
    "limit_val_batches": bool,
    "val_check_interval": lambda value: value is not None and repr(value) != "1.0",
    "check_val_every_n_epoch": lambda value: value != 1,
    "num_sanity_val_steps": bool,
}
"""By flag: whether a value asks for a validation."""

FOREIGN_TO_US: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "batches are planned for one trainer.accumulate_grad_batches; use that",
    BatchSizeFinder: "the size of a micro-batch is data.token_budget",
    LearningRateFinder: "it would train the one student to find a rate; use the stages' learning_rate",
    StochasticWeightAveraging: "it would put weights into the student that no stage and no rollout has had",
    WeightAveraging: "it would put weights into the student that no stage and no rollout has had",
    ModelPruning: "it would change the student that the stages share behind their back",
    BaseFinetuning: "the student has no backbone to freeze; use student.lora",
    BasePredictionWriter: NO_TEST,
    OnExceptionCheckpoint: "a later fit would begin from what it saved; a run saves itself (--resume)",
    ThroughputMonitor: "batches differ in length; tokens and seconds of each stage stand in summary.json",
}
NEEDS_LOGGER = (LearningRateMonitor, DeviceStatsMonitor)


def refuse_flags(config: Mapping[str, Any], has_budget: bool, has_validation: bool = False) -> None:
    """Refuses what a run cannot honour, and says what a flag means here that is not plain.

    Args:
        config: keyword arguments of a Trainer.
        has_budget: curriculum.max_tokens is set.
        has_validation: there are problems to validate on.

    Raises:
        ValueError: a flag is refused; the message names it, its value and what to use.
    """
    for flag, asks in WITH_VALIDATION.items():
        if flag in config and asks(config[flag]) and not has_validation:
            raise ValueError(f"trainer.{flag}: {config[flag]!r} is refused: {NO_VALIDATION}")
    for flag, (is_refused, why) in REFUSED.items():
        if flag in config and is_refused(config[flag]):
            raise ValueError(f"trainer.{flag}: {config[flag]!r} is refused: {why}")
    interval = config.get("val_check_interval")
    counts_by_epoch = config.get("check_val_every_n_epoch", 1) is not None
    if isinstance(interval, int) and interval > 1 and counts_by_epoch:
        raise ValueError(f"trainer.val_check_interval: {interval} is refused: an epoch may have fewer batches; with "
                         "trainer.check_val_every_n_epoch null they are counted over all epochs")  # fmt: skip
    for flag in ("min_epochs", "min_steps"):
        if has_budget and config.get(flag):
            raise ValueError(f"trainer.{flag}: {config[flag]!r} is refused: a fit would go on beyond "
                             "curriculum.max_tokens")  # fmt: skip
    if config.get("fast_dev_run"):
        log.info("trainer.fast_dev_run: %d batches a stage, without loggers and without checkpoints within a stage",
                 int(config["fast_dev_run"]))  # fmt: skip
    elif config.get("enable_checkpointing") is False:
        log.info("trainer.enable_checkpointing is false: a run that is cut off goes on after the newest whole stage")


def check_validated_epochs(config: Mapping[str, Any], epochs: Mapping[str, int]) -> None:
    """Refuses to be validated less often than any fit has epochs, and says which stages have too few.

    Args:
        config: keyword arguments of a Trainer.
        epochs: of a fit, by stage.

    Raises:
        ValueError: no stage would be validated.
    """
    every, most = config.get("check_val_every_n_epoch", 1), config.get("max_epochs")
    if every is None:
        return
    fitted = {stage: min(each, most) if most is not None and most > 0 else each for stage, each in epochs.items()}
    never = {stage: each for stage, each in fitted.items() if each < every}
    counts = ", ".join(f"{each} of {stage}" for stage, each in never.items())
    if never and len(never) == len(fitted):
        raise ValueError(f"trainer.check_val_every_n_epoch: {every} is refused: no fit has so many epochs ({counts}), "
                         "and none would be validated")  # fmt: skip
    if never:
        log.info("trainer.check_val_every_n_epoch is %d: too few epochs for a validation has %s", every, counts)


def refuse_callbacks(
    callbacks: Sequence[Callback], logged: Mapping[str, Logged], has_logger: bool, validated: Sequence[str] = ()
) -> None:
    """Refuses callbacks that would fail in a fit or do nothing, and says which are in some of the stages alone.

    Args:
        logged: what each stage of the run logs.
        validated: the metrics of a validation; none where there is none.

    Raises:
        ValueError: one is refused; the message names its class.
    """
    others_log = any(_is_foreign(callback) for callback in callbacks)
    for callback in callbacks:
        name = f"trainer.callbacks: {type(callback).__name__}"
        for kind, why in FOREIGN_TO_US.items():
            if isinstance(callback, kind):
                raise ValueError(f"{name} is refused: {why}")
        if isinstance(callback, NEEDS_LOGGER) and not has_logger:
            raise ValueError(f"{name} has nowhere to write to: trainer.logger is false")
        if (location := unsavable(_state(callback))) is not None:
            raise ValueError(f"{name}: its state cannot be kept in a checkpoint: {location}")
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            checked_folder(f"{name}.dirpath", str(callback.dirpath))
        if isinstance(callback, EarlyStopping) and waits_for_validation(callback) and not validated:
            raise ValueError(f"{name} is refused with check_on_train_epoch_end false: {NO_VALIDATION}")
        if isinstance(watched := getattr(callback, "monitor", None), str):
            check_watched(callback, watched, logged, validated, others_log)


def in_stage(callbacks: Sequence[Callback], stage: str) -> list[Callback]:
    """The callbacks of a stage's fit: without those that watch a metric of another stage."""
    mine = []
    for callback in callbacks:
        watched = getattr(callback, "monitor", None)
        of = watched.partition("/")[0] if isinstance(watched, str) else ""
        if of in METRICS and of != stage:
            continue
        if isinstance(callback, EarlyStopping) and of in ("grpo", "val"):
            callback.strict = False  # an epoch may be without an update, or without a validation
        mine.append(callback)
    return mine


def check_loggers(loggers: Sequence[Any]) -> None:
    """Refuses a logger that cannot write where it is told to.

    Raises:
        ValueError: a file is in the way, or there is no permission; the message names the folder.
    """
    for logger in loggers:
        folder = logger.save_dir
        if isinstance(folder, str | Path) and folder and "://" not in str(folder):
            name = f"trainer.logger: save_dir of {type(logger).__name__}"
            checked_folder(name, str(Path(folder) / "x"))  # what is written has a name of its own: `.` is fine here
            new = [each for each in (Path(folder), *Path(folder).parents) if not each.exists()]
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{name}: {folder} cannot be made ({error.strerror})") from error
            for each in new:  # within the run's own folder, it would count as taken
                each.rmdir()


def _is_foreign(callback: Callback) -> bool:
    """True for a class of the user's, which may log metrics of its own, and for Lightning's that does so."""
    package = type(callback).__module__.partition(".")[0]
    return package not in ("lightning", "pytorch_lightning", "slmreason") or isinstance(callback, LearningRateMonitor)


def _state(callback: Callback) -> Any:
    try:
        return callback.state_dict()
    except Exception:  # not in a fit yet
        return {}
