"""What the three LightningModules share: the one student, its optimizer, a schedule that needs no step count, and what
becomes of a step whose loss or gradient is not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.nonfinite import gradient_norm, save_bad_batch
from slmreason.modules.settings import FitSettings
from slmreason.modules.validation import ValidatedModule
from slmreason.runtime.lightning_internals import attached_trainer
from slmreason.student import Student
from slmreason.student.optimizer import make_adamw, release
from slmreason.student.optimizers import make_by_class
from slmreason.student.weights import shard

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Several optimizer steps in a row had a loss or a gradient that is not finite."""


class StudentModule(ValidatedModule):
    """Trains a `Student` that it does not own: consecutive fits hand the same object on."""

    stage: str = ""

    def __init__(self, student: Student, settings: FitSettings) -> None:
        super().__init__()
        self.student = student
        self.settings = settings
        self.strict_loading = False  # a checkpoint has what is trained, and nothing else
        self.share_spent: Callable[[], float] = lambda: 0.0
        """Share of the token budget spent; the decay follows it."""
        self.setup("fit")

    def setup(self, stage: str) -> None:
        """Counts are of one fit; this comes before a checkpoint is read."""
        self.skipped_steps, self.skipped_in_a_row = 0, 0
        self.step_skipped, self.gradient_norm = False, math.nan
        """Of the newest optimizer step."""
        self._batches: list[Any] = []
        self._loss = 0.0

    def enter(self, data: ReasoningDataModule) -> int:
        """Reads the pool and draws the set of a fit whose Trainer was given this module and that one by hand.

        Returns:
            How many rows the fit starts with.

        Raises:
            ValueError: the pool cannot be read, or the stage has no set without a curriculum.
        """
        raise ValueError(f"{self.stage}: there is no set without a curriculum; call data.enter(set) before the fit")

    def configure_model(self) -> None:
        """Shards the student under FSDP2; from the second fit on it already is."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            shard(self.student.network, self.student.base_model, strategy.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or what the settings name, on what is trainable, in float32 whatever the student's precision is."""
        optimizer = optimizer_of(self.student, self.settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(self))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device, non_blocking=True) if hasattr(batch, "to") else batch

    def on_fit_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ReasoningDataModule) and data.holdout and self.validation is None:
            log.info("%s: there is no validation: module.validation says with what to sample and grade", self.stage)
        self.student.train()

    def on_train_start(self) -> None:
        steps = steps_ahead(self)
        if steps and steps <= self.settings.warmup_steps:
            log.info("%s: the fit has about %d optimizer steps and is over within its warm-up: the learning rate stays "
                     "below %g (%s.warmup_steps is %d)", self.stage, steps, self.settings.learning_rate, self.stage,
                     self.settings.warmup_steps)  # fmt: skip

    def on_fit_end(self) -> None:
        for optimizer in self.trainer.optimizers:
            self.student.trained.keep_masters(release(optimizer))
        self.student.eval()

    # -- steps that are not finite ----------------------------------------------------------------------------------

    def loss_of(self, batch: Any) -> Tensor:
        """The loss of one micro-batch; a step's is their sum."""
        raise NotImplementedError

    def watch(self, batches: Sequence[Any], loss: float) -> None:
        """Notes micro-batches of the optimizer step to come, and their loss over all processes."""
        self._batches += batches
        self._loss += loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skips the step if its loss or its gradient is not finite. Every process sees the same of both.

        Gradients are reduced and unscaled here, and clipped after: clipping by value would hide what is infinite.

        Raises:
            NonFiniteError: it was the last of `max_skipped_steps` in a row; the step is saved first.
        """
        loss, norm = self._loss, gradient_norm([p for group in optimizer.param_groups for p in group["params"]])
        batches, self._batches, self._loss = self._batches, [], 0.0
        self.step_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not self.step_skipped:
            self.skipped_in_a_row = 0
        else:
            optimizer.zero_grad()  # without any gradient AdamW leaves weights, moments and decay alone
            if not (math.isfinite(loss) and seeks_scale(self.trainer)):
                self.skipped_steps += 1
                self.skipped_in_a_row += 1
                numbers = {"loss": f"{loss:g}", "gradient_norm": f"{norm:g}"}
                report_skipped_step(self, batches, numbers, rate=optimizer.param_groups[0]["lr"])
        self.gradient_norm = norm
        if self.automatic_optimization:  # else this is within training_step, whose own values Lightning would drop
            self.log_dict(self.step_metrics())

    def step_metrics(self) -> dict[str, float]:
        """What is logged of the newest optimizer step."""
        return {f"{self.stage}/gradient_norm": self.gradient_norm,
                f"{self.stage}/skipped_steps": float(self.skipped_steps)}  # fmt: skip

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        if not self.step_skipped:  # torch cannot clip what is not there
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["policy_version"] = self.student.policy_version
        checkpoint["skipped_steps"] = [self.skipped_steps, self.skipped_in_a_row]
        # What is frozen comes from where the student came from.
        trained = {f"student.network.{n}" for n, p in self.student.network.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.student.policy_version = checkpoint["policy_version"]
        self.skipped_steps, self.skipped_in_a_row = checkpoint.get("skipped_steps", (0, 0))


def optimizer_of(student: Student, settings: FitSettings) -> Optimizer:
    """The optimizer of one fit, which goes on from the float32 copies that an earlier one has left."""
    parameters, masters = student.trained.parameters(), student.trained.take_masters()
    rate, decay = settings.learning_rate, settings.weight_decay
    if (chosen := settings.by_class()) is None:
        return make_adamw(parameters, rate, decay, masters=masters)
    ends = (student.network.get_input_embeddings(), student.network.get_output_embeddings())
    embeddings = [p for module in ends if module is not None for p in module.parameters()]
    return make_by_class(chosen, parameters, rate, decay, embeddings, masters)


def sum_over_processes(module: L.LightningModule, *values: float | Tensor) -> list[float]:
    """Each value summed over the processes, in one reduction."""
    device = module.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    stacked = torch.stack([torch.as_tensor(value, dtype=dtype, device=device).detach() for value in values])
    return [float(total) for total in module.trainer.strategy.reduce(stacked, reduce_op="sum")]


def seeks_scale(trainer: L.Trainer) -> bool:
    """True when the gradient may have overflowed by the factor of `16-mixed`, which is halved until it does not."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1


def report_skipped_step(module: StudentModule, batches: Sequence[Any], numbers: dict[str, str], rate: float) -> None:
    """Warns of a step that was skipped.

    Args:
        batches: the micro-batches of this process.
        numbers: `loss` and `gradient_norm`, as they are shown.
        rate: the learning rate.

    Raises:
        NonFiniteError: it was the last of `max_skipped_steps` in a row; the step is saved first.
    """
    trainer, stage = module.trainer, module.stage
    location = f"{stage}, epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
    what = f"loss {numbers['loss']}, gradient norm {numbers['gradient_norm']}"
    if module.skipped_in_a_row < module.settings.max_skipped_steps:
        log.warning("%s: skipped (%s); %d in a row", location, what, module.skipped_in_a_row)
        return
    path = Path(trainer.default_root_dir) / f"bad-batch-step-{trainer.global_step}.safetensors"
    about = {"stage": stage, "epoch": trainer.current_epoch, "step": trainer.global_step,
             "learning_rate": rate, "precision": str(trainer.precision), **numbers}  # fmt: skip
    save_bad_batch(path, module.student, batches, about)
    raise NonFiniteError(
        f"{location}: {what}; {module.skipped_in_a_row} steps in a row had no finite loss and gradient: skipped. "
        f"The batch and the weights are in {path} (slmreason.modules.nonfinite.repeat_bad_batch repeats the step). "
        f"Lower {stage}.learning_rate (it was {rate:.3g}), set trainer.gradient_clip_val, use bf16-true or "
        "32-true as trainer.precision in place of 16, or look at the rows of the batch"
    )


def learning_rate_factor(module: StudentModule) -> Callable[[int], float]:
    """Linear warm-up over `warmup_steps`, then a decay over the *share of the fit that is done*.

    That is of its epochs, or of the tokens it may take, whichever is further on. Sets shrink from epoch to epoch, so
    the number of steps is not known beforehand; the share is always exact.
    """

    settings = module.settings

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
        done = share_done(module)
        if settings.decay == "linear":
            return warm * (1 - done)
        if settings.decay == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * done))
        return warm

    return factor


def steps_ahead(module: StudentModule) -> int | None:
    """Optimizer steps of a fit whose epochs are all as long as the first one; None where that is not known."""
    trainer = attached_trainer(module)
    if trainer is None or not trainer.max_epochs or trainer.max_epochs < 0 or trainer.num_training_batches == math.inf:
        return None
    batches = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * trainer.max_epochs
    return batches * getattr(module.settings, "updates_per_batch", 1)


def share_done(module: StudentModule, with_present: bool = True) -> float:
    """How much of the fit is done, within 0 and 1; 0 outside a fit.

    Args:
        with_present: the batch that is being worked on counts as done.
    """
    trainer = attached_trainer(module)
    if trainer is None or not trainer.training or not trainer.max_epochs or trainer.max_epochs < 0:
        return 0.0
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    if batches in (0, math.inf):  # not known before the first epoch
        return 0.0
    # In optimizer steps, so that accumulating in one process and sharing among several give the same rates.
    steps, progress = math.ceil(batches / accumulate), trainer.fit_loop.epoch_loop.batch_progress.current
    inside = math.ceil((progress.ready if with_present else progress.completed) / accumulate) / steps
    return max(module.share_spent(), min(1.0, (trainer.current_epoch + inside) / trainer.max_epochs))
