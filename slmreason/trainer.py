"""One Lightning Trainer for each fit, from the user's `trainer` section plus what a stage needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.callbacks.timer import Timer
from lightning.pytorch.loggers import CSVLogger, Logger

from slmreason.modules.grpo import GRPOModule

FreshConfig = Callable[[], dict[str, Any]]
"""Gives the keyword arguments of a Trainer with callbacks, loggers and strategy newly made."""


def build_trainer(
    fresh_config: FreshConfig,
    module: L.LightningModule,
    stage_dir: Path,
    epochs: int,
    callbacks: Sequence[Callback],
    time_left: timedelta | None,
) -> L.Trainer:
    """The Trainer of one fit.

    The user's flags stand, with four additions: max_epochs is at most `epochs`, max_time is what is left of the whole
    run's, the dataloader is rebuilt at each epoch boundary, and metrics.csv and checkpoints lie in the stage's folder.
    """
    config = fresh_config()
    wanted = config.get("max_epochs")
    config["max_epochs"] = epochs if wanted is None or wanted < 0 else min(epochs, wanted)
    config["max_time"] = time_left
    config["default_root_dir"] = str(stage_dir)
    config["reload_dataloaders_every_n_epochs"] = 1
    config["use_distributed_sampler"] = False  # batches are planned for all ranks at once
    config["logger"] = _loggers(config.get("logger"), stage_dir)
    config["callbacks"] = _callbacks(config, callbacks, stage_dir)
    if config.get("enable_model_summary") is None:
        config["enable_model_summary"] = False  # the same student in every fit: say it only when asked
    config["log_every_n_steps"] = config.get("log_every_n_steps") or 1
    if isinstance(module, GRPOModule):
        # Lightning refuses both under manual optimisation; GRPO does them itself.
        module.gradient_clip_val = config.pop("gradient_clip_val", None)
        module.gradient_clip_algorithm = config.pop("gradient_clip_algorithm", None)
        config.pop("accumulate_grad_batches", None)  # its batches are that much larger instead
    return L.Trainer(**config)


def run_time(fresh_config: FreshConfig) -> timedelta | None:
    """`trainer.max_time` as a duration: the budget of the whole run."""
    wanted = fresh_config().get("max_time")
    return timedelta(seconds=Timer(wanted).time_remaining() or 0) if wanted is not None else None


def _loggers(wanted: Any, stage_dir: Path) -> Any:
    if wanted is False:
        return False
    given: list[Logger] = [] if wanted is None or wanted is True else wanted if isinstance(wanted, list) else [wanted]
    return [CSVLogger(str(stage_dir), name="", version="", flush_logs_every_n_steps=20), *given]


def _callbacks(config: dict[str, Any], ours: Sequence[Callback], stage_dir: Path) -> list[Callback]:
    given = config.get("callbacks") or []
    theirs = list(given) if isinstance(given, list) else [given]
    mine = list(ours)
    if config.get("enable_progress_bar") is False or any(isinstance(c, ProgressBar) for c in theirs):
        mine = [callback for callback in mine if not isinstance(callback, ProgressBar)]
    if config.get("enable_checkpointing") is not False and not any(isinstance(c, ModelCheckpoint) for c in theirs):
        mine.append(ModelCheckpoint(dirpath=stage_dir / "checkpoints", filename="{epoch}-{step}"))
    # Ours first: evidence must be in the ledger before a user's callback looks at it.
    return [*mine, *theirs]


def device_of(config: dict[str, Any]) -> torch.device:
    """The device on which a Trainer of this configuration puts the student.

    Raises:
        ValueError: the configuration asks for more than one process, which the curriculum cannot do yet: each would
            sample and record the same problems.
    """
    kept = {
        key: config[key]
        for key in ("accelerator", "devices", "num_nodes", "strategy", "precision")
        if config.get(key) is not None
    }
    trainer = L.Trainer(**kept, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    if trainer.world_size > 1:
        raise ValueError(
            f"trainer.devices and trainer.num_nodes give {trainer.world_size} processes, but so far a run is one: "
            "add --trainer.devices 1"
        )
    return torch.device(trainer.strategy.root_device)
