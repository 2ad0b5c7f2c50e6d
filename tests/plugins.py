"""Classes that tests name in a configuration, for runs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from slmreason.records import Problem
from slmreason.verify.rewards import RewardFn, Verdict


class CoinReward(RewardFn):
    """For students of random weights, which solve nothing: every worked solution of the dataset is accepted, and of
    whatever else is written three in ten, by the text alone."""

    def __call__(self, problem: Problem, text: str) -> Verdict:
        correct = "The answer is" in text or zlib.crc32(text.encode()) % 10 < 3
        return Verdict(float(correct), correct)


class ProbeOnlyReward(RewardFn):
    """Accepts every second of the first hundred completions and nothing after: problems are learnable when they are
    measured, and fail once GRPO has begun."""

    def __init__(self) -> None:
        self.graded = 0

    def __call__(self, problem: Problem, text: str) -> Verdict:
        self.graded += 1
        correct = self.graded <= 100 and self.graded % 2 == 0
        return Verdict(float(correct), correct)


class Dies(Callback):
    """Sends its process a signal after a training step: DIES_IN names the stage, DIES_AT the batch (the first if not
    set), DIES_RANK the process (all if not set), DIES_BY the signal (SIGKILL if not set)."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        mine = int(os.environ.get("DIES_RANK", trainer.global_rank)) == trainer.global_rank
        here = pl_module.stage == os.environ.get("DIES_IN") and batch_idx >= int(os.environ.get("DIES_AT", 0))
        if mine and here:
            os.kill(os.getpid(), signal.Signals[os.environ.get("DIES_BY", "SIGKILL")])


class SameEverywhere(Callback):
    """Fails the run unless every process has the same strata, the same number of batches and the same evidence."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        mine = (data.band_of, data.ledger.version, trainer.num_training_batches, pl_module.student.policy_version)
        everyone: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(everyone, mine)
        assert mine[0]
        assert all(theirs == mine for theirs in everyone), f"process {trainer.global_rank} differs from another"


class KillsEngine(Callback):
    """Kills the rollout engine's worker process after the first GRPO step, where KILL_ENGINE is set."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.stage == "grpo" and os.environ.get("KILL_ENGINE"):
            pl_module.engine._core._process.kill()


class Raises(Callback):
    """Fails after the first training step."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("as it was told to")


class Recorder(Logger):
    """Writes what it is told into a file, a line a call. RECORDER_FAILS is what it says when it is asked to begin."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)

    @property
    def name(self) -> str:
        return "recorded"

    @property
    def version(self) -> str:
        if why := os.environ.get("RECORDER_FAILS"):
            raise RuntimeError(why)
        return "the only one"

    def resume(self, version: str, step: int | None) -> None:
        self._write(call="resume", version=version, step=step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._write(call="log", metrics={name: float(value) for name, value in metrics.items()}, step=step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._write(call="config")

    def finalize(self, status: str) -> None:
        self._write(call="finalize", status=status)

    def _write(self, **call: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(call) + "\n")
