"""Group-relative policy optimisation on the student's own rollouts.

How this differs from textbook GRPO: (1) groups without reward variance get no forward or backward pass, and the loss is
normalised over the others; (2) on policy, old log-probs are the new ones detached, so there is no second forward;
(3) the reference policy exists only when KL > 0, and with LoRA it is the base with its adapters off; (4) every group,
trained on or not, leaves the step for the callbacks that record and harvest; (5) what no rollout solved may be rescued
(`slmreason.modules.rescue`), which adds groups or traces to the step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules import policy_batch
from slmreason.modules.base import sum_over_processes
from slmreason.modules.by_hand import ProblemsToSolve, load
from slmreason.modules.policy_batch import PolicyBatch, sampler_correction
from slmreason.modules.record import RecordRollouts, records_into
from slmreason.modules.rescue.base import Added
from slmreason.modules.rescue.batches import TraceBatch, trace_batches
from slmreason.modules.rescue.module import RescuingModule
from slmreason.modules.settings import GRPOSettings
from slmreason.modules.validation import Validation
from slmreason.objectives import entropy_surrogate, kl_penalty, policy_loss, trace_loss
from slmreason.records import Place, Rollout, RolloutGroup
from slmreason.rollout.engine import RolloutEngine, prompt_limit
from slmreason.runtime.lightning_internals import logged_metrics
from slmreason.student import Student
from slmreason.student.packing import PromptBatch
from slmreason.verify.rewards import RewardFn, Step

log = logging.getLogger(__name__)
TRACE_NLL = "rescue/nll"
"""The metric that is a mean over the tokens of traces; the others are over those of completions."""


class GRPOModule(RescuingModule):
    """Makes reliable what the student can do sometimes."""

    stage = GRPOSettings.stage
    settings: GRPOSettings

    def __init__(
        self, student: Student, engine: RolloutEngine, reward: RewardFn, settings: GRPOSettings | None = None
    ) -> None:
        super().__init__(student, engine, reward, settings or GRPOSettings())
        # Rollouts decide how many micro-batches a step has, so the step is ours to take.
        self.automatic_optimization = False
        self.gradient_clip_val: float | None = None
        """Set from trainer.gradient_clip_val, which Lightning itself refuses under manual optimisation."""
        self.gradient_clip_algorithm: str | None = None
        """Set from trainer.gradient_clip_algorithm."""
        self.token_budget = 8192
        """Set from data.token_budget."""
        self._engine_is_behind = True
        """The student has changed since the engine got its weights."""

    def enter(self, data: ReasoningDataModule) -> int:
        """Every problem that is not mastered by the evidence there is."""
        tokens = self.settings.max_completion_tokens
        data.wants_column = self.reward.wants_column
        load(data, self.student, prompt_limit(self.student, self.engine, tokens, f"{tokens} tokens of a completion"))
        if data.holdout and self.validation is None:
            self.validation = Validation.of(self.engine, self.reward, tokens)
        self.token_budget = data.token_budget
        return data.enter(ProblemsToSolve(Place(1, self.stage), self.settings))

    def configure_callbacks(self) -> list[Callback]:
        """The data module draws its sets from these very rollouts: what records them is attached where nobody did."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ReasoningDataModule) or records_into(data.ledger, self.trainer):
            return []
        return [RecordRollouts(data.ledger, Place(1, self.stage))]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.settings.kl > 0:
            self.student.reference_policy.freeze()
        if (
            self.settings.mask_mismatch is not None
            and self._sampler_is_exact
            and "16" not in str(self.trainer.precision)
        ):
            log.info(
                "grpo.mask_mismatch does nothing here: %s has the trainer's own numbers", type(self.engine).__name__
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.settings.kl > 0:  # what the fit began with, which the checkpoint's weights are about to replace
            self.student.reference_policy.freeze()
        super().on_load_checkpoint(checkpoint)

    def on_train_start(self) -> None:
        super().on_train_start()
        self._engine_is_behind = True

    def on_fit_end(self) -> None:
        super().on_fit_end()
        self.student.reference_policy.drop()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        if self._engine_is_behind:  # not after the update: what the last one leaves on the GPU nobody would sample from
            self.engine.sync(self.student)
            self._engine_is_behind = False
        self.reward.at_step(step_of(self.trainer, self.settings.updates_per_batch))
        groups = self.sample_groups(batch, batch_idx)
        forget_update(self.trainer)
        self._log_rollouts(groups)
        batches = self.step_batches(groups, self.rescued(groups, batch_idx))
        loss, stepped = 0.0, False
        for _ in range(self.settings.updates_per_batch if batches else 0):
            loss = self._update(batches)
            if self.step_skipped:
                break  # the weights are as they were: so would be the next update
            stepped = True
        if stepped:
            self.student.policy_version += 1
            self._engine_is_behind = True
        # In float32 whatever the default dtype is: Lightning's `bf16-true` makes that bfloat16 within a step.
        shown = torch.tensor(loss, dtype=torch.float32, device=self.device)
        return {"loss": shown, "rollout_groups": groups}

    # -- the update -------------------------------------------------------------------------------------------------

    def step_batches(self, groups: Sequence[RolloutGroup], added: Added) -> list[PolicyBatch | TraceBatch]:
        """This process's micro-batches of an optimizer step with what a rescue adds to it."""
        policy = self.policy_batches([*groups, *added.groups])
        if added.policy_scale is not None:
            for batch in policy:
                batch.scale = torch.tensor(added.policy_scale, dtype=torch.float32, device=self.student.device)
        return [*policy, *trace_batches(added.traces, self.student, self.token_budget)]

    def policy_batches(self, groups: Sequence[RolloutGroup]) -> list[PolicyBatch]:
        """This process's micro-batches of an optimizer step: see `slmreason.modules.policy_batch`."""
        return policy_batch.policy_batches(groups, self.student, self.settings, self.token_budget)

    def _update(self, batches: Sequence[PolicyBatch | TraceBatch]) -> float:
        """One optimizer step on all micro-batches of a step; its loss over all processes."""
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        sums: dict[str, float] = {}
        for number, batch in enumerate(batches, start=1):
            loss, metrics = self.batch_step(batch)
            with gradient_reduction(self.trainer, is_last=number == len(batches)):
                # Data parallelism averages over ranks; the weights already are of the global batch.
                self.manual_backward(loss * self.trainer.world_size)
            for name, value in {"loss": float(loss.detach()), **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value
        traces = [batch for batch in batches if isinstance(batch, TraceBatch)]
        total, targets, of_traces, computed, *others = sum_over_processes(
            self,
            sums.pop("loss"),
            sum(batch.packed.num_target_tokens for batch in batches),
            sum(batch.packed.num_target_tokens for batch in traces),
            sum(batch.packed.num_tokens for batch in batches),
            *sums.values(),
        )
        self.student.tokens.trained += int(computed)
        self.watch(batches, total)
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        tokens = {name: of_traces if name == TRACE_NLL else targets - of_traces for name in sums}
        means = {f"grpo/{name}": value / tokens[name] for name, value in zip(sums, others, strict=True)}
        self.log_dict({"grpo/loss": total, **means, **self.step_metrics()}, batch_size=int(targets))
        return total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.gradient_clip_val is not None and not self.step_skipped:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def loss_of(self, batch: PolicyBatch | TraceBatch) -> Tensor:
        return self.batch_step(batch)[0]

    def batch_step(self, batch: PolicyBatch | TraceBatch) -> tuple[Tensor, dict[str, float]]:
        """Loss of one micro-batch in that of the step, and token sums of what is worth logging."""
        if isinstance(batch, TraceBatch):
            return self.trace_step(batch)
        loss, metrics = self.policy_step(batch)
        return loss if batch.scale is None else loss * batch.scale, metrics

    def trace_step(self, batch: TraceBatch) -> tuple[Tensor, dict[str, float]]:
        """The same of traces: SFT's loss, at temperature 1."""
        log_probs = self.student(batch.packed).log_probs
        loss = trace_loss(log_probs, batch.weights, by_uncertainty=self.settings.rescue.kind == "chord")
        return loss, {TRACE_NLL: float(-log_probs.detach().sum())}

    def policy_step(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, float]]:
        """Loss of one micro-batch, and token sums of what is worth logging."""
        settings = self.settings
        if settings.kl > 0 and batch.reference_log_probs is None:
            with torch.no_grad(), self.student.evaluating(), self.student.reference_policy.answering():
                batch.reference_log_probs = self.student.score(batch.packed, settings.temperature).log_probs
        scores = self.student(batch.packed, settings.temperature, with_entropy=True)
        if batch.old_log_probs is None:
            batch.old_log_probs = scores.log_probs.detach()
        correction = None
        if not self._sampler_is_exact:
            correction = sampler_correction(batch, settings)
        loss, clipped = policy_loss(
            scores.log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.weights,
            completion_lengths=batch.packed.target_lengths,
            loss=settings.loss,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            importance_weights=correction,
            cispo_cap=settings.cispo_cap,
            sapo_temperatures=(settings.sapo_temperature_pos, settings.sapo_temperature_neg),
        )
        mismatch = (batch.old_log_probs - batch.sampler_log_probs).abs().sum()
        metrics = {"entropy": float(scores.entropy.sum()), "clipped": float(clipped.sum())}  # type: ignore[union-attr]
        metrics["sampler_mismatch"] = float(mismatch)
        if settings.mask_mismatch is not None:
            metrics["masked"] = float((correction == 0).sum()) if correction is not None else 0.0
        if settings.entropy_bonus > 0:
            entropy = entropy_surrogate(scores.log_probs, batch.old_log_probs, scores.entropy, correction)  # type: ignore[arg-type]
            loss = loss - settings.entropy_bonus * entropy.sum() / batch.packed.global_target_tokens
        if batch.reference_log_probs is not None:
            penalty = kl_penalty(scores.log_probs, batch.reference_log_probs)
            loss = loss + settings.kl * (batch.weights * penalty).sum()
            metrics["kl"] = float(penalty.detach().sum())
        return loss, metrics

    @property
    def _sampler_is_exact(self) -> bool:
        """Whether the engine's log-probs are the trainer's own numbers: never in half precision, where the same product
        in a batch of another shape is rounded otherwise."""
        half = self.student.base_model.dtype != torch.float32 or torch.is_autocast_enabled(self.device.type)
        return self.engine.exact and not half

    def _log_rollouts(self, groups: Sequence[RolloutGroup]) -> None:
        for name, value in rollout_shares(groups).items():
            show = name in ("reward", "informative")
            self.log(f"grpo/{name}", value, prog_bar=show, batch_size=len(groups), on_step=True, on_epoch=True)


def rollout_shares(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """What is logged of the rollouts of a step: shares of the groups or of the rollouts, and means of a rollout."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count, size = len(groups), len(rollouts)
    return term_means(rollouts) | {
        "reward": sum(rollout.reward for rollout in rollouts) / size,
        "informative": sum(group.informative for group in groups) / count,
        "all_zero": sum(group.all_zero for group in groups) / count,
        "all_one": sum(group.all_one for group in groups) / count,
        "truncated": sum(rollout.truncated for rollout in rollouts) / size,
        "completion_tokens": sum(len(rollout.completion_ids) for rollout in rollouts) / size,
    }


def term_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """By term of the reward, its mean over the rollouts that it applies to."""
    found: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, score in rollout.scores.items():
            if score is not None:
                found.setdefault(f"reward/{name}", []).append(score)
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


def step_of(trainer: L.Trainer, updates_per_batch: int) -> Step:
    """Where a fit stands, as reward functions are told."""
    epochs, batches = trainer.max_epochs or 0, trainer.num_training_batches
    planned = int(epochs * batches * updates_per_batch) if epochs > 0 else 0
    limits = [limit for limit in (planned, trainer.max_steps) if limit > 0]
    return Step(trainer.global_step, min(limits, default=0), float(trainer.current_epoch), max(epochs, 0))


def gradient_reduction(trainer: L.Trainer, is_last: bool) -> AbstractContextManager[None]:
    """DDP reduces gradients in the last backward pass of a step alone."""
    strategy = trainer.strategy
    if is_last or not isinstance(strategy, ParallelStrategy):
        return nullcontext()
    return strategy.block_backward_sync()


def forget_update(trainer: L.Trainer) -> None:
    """A step without an update has no loss to show: Lightning would show the last one's until the epoch ends."""
    for metric in logged_metrics(trainer).values():
        if metric.meta.fx == "training_step" and not metric.meta.on_epoch:  # callbacks log what they like
            metric.reset()
