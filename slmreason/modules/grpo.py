"""Group-relative policy optimisation on the student's own rollouts.

How this differs from textbook GRPO: (1) groups without reward variance get no forward or backward pass, and the loss is
normalised over the others; (2) on policy, old log-probs are the new ones detached, so there is no second forward;
(3) the reference policy exists only when KL > 0, and with LoRA it is the base with its adapters off; (4) every group,
trained on or not, leaves the step for the callbacks that record and harvest.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.base import Decay, StudentModule
from slmreason.modules.by_hand import ProblemsToSolve, load
from slmreason.modules.policy_batch import PolicyBatch
from slmreason.modules.record import RecordRollouts, records_into
from slmreason.objectives import (
    AdvantageScale,
    PolicyLoss,
    group_advantages,
    kl_penalty,
    policy_loss,
    token_weights,
    truncated_importance,
)
from slmreason.records import Example, Place, Rollout, RolloutGroup
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import RolloutEngine, Sampling, prompt_limit, stable_seed
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import rank, world_size
from slmreason.student import Student
from slmreason.student.packing import PromptBatch, bundle, bundle_length, collate, plan_batches, without_targets
from slmreason.verify.rewards import RewardFn


class GRPOModule(StudentModule):
    """Makes reliable what the student can do sometimes."""

    stage = "grpo"

    def __init__(
        self,
        student: Student,
        engine: RolloutEngine,
        reward: RewardFn,
        learning_rate: float = 1e-6,
        epochs: int = 1,
        prompts_per_step: int = 16,
        group_size: int = 8,
        max_completion_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        loss: PolicyLoss = "grpo",
        advantage_scale: AdvantageScale = "group",
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        kl: float = 0.0,
        updates_per_batch: int = 1,
        importance_cap: float = 2.0,
        mask_truncated: bool = True,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: Decay = "constant",
        max_skipped_steps: int = 3,
        seed: int = 0,
    ) -> None:
        """
        Args:
            learning_rate: Peak learning rate of AdamW.
            epochs: Epochs of each GRPO fit; the set is drawn anew before each.
            prompts_per_step: Problems of one optimizer step (times trainer.accumulate_grad_batches), of all processes
                together.
            group_size: Rollouts of each problem; TRL calls it num_generations.
            max_completion_tokens: A rollout is cut here.
            temperature: Of sampling; the policy's logits are divided by it too.
            top_p: Nucleus of sampling. Log-probs, ratios and the sampler correction are of the whole distribution.
            loss: Which policy loss (see `slmreason.objectives.token_weights`); TRL calls it loss_type.
            advantage_scale: `group` divides by the group's standard deviation, `none` does not; TRL: scale_rewards.
            clip_low: The ratio is clipped below at 1 - clip_low; TRL calls it epsilon.
            clip_high: The ratio is clipped above at 1 + clip_high; TRL calls it epsilon_high.
            kl: Weight of the KL penalty to the reference policy; TRL calls it beta. At 0 there is no reference model.
            updates_per_batch: Optimizer steps on each batch of rollouts; TRL calls it num_iterations.
            importance_cap: Cap of the sampler correction, which is on where the rollout engine's log-probs differ from
                the trainer's: with another engine than HFEngine, and in half precision.
            mask_truncated: Leave rollouts that hit the token limit out of the loss.
            weight_decay: On matrices only.
            warmup_steps: Optimizer steps of linear warm-up at the start of each fit.
            decay: How the learning rate falls over the fit.
            max_skipped_steps: A step whose loss or gradient is not finite is skipped; the run stops, and keeps the
                batch, when this many in a row are.
            seed: Of sampling.
        """
        super().__init__(student, learning_rate, epochs, weight_decay, warmup_steps, decay, max_skipped_steps)
        positive = {"prompts_per_step": prompts_per_step, "max_completion_tokens": max_completion_tokens,
                    "updates_per_batch": updates_per_batch, "group_size - 1": group_size - 1}  # fmt: skip
        for key, value in positive.items():
            if value < 1:
                raise ValueError(f"grpo.{key} must be at least 1, got {value}")
        if temperature <= 0:
            raise ValueError(f"grpo.temperature must be above 0 (equal rollouts teach nothing), got {temperature}")
        # Rollouts decide how many micro-batches a step has, so the step is ours to take.
        self.automatic_optimization = False
        self.engine, self.reward = engine, reward
        self.prompts_per_step, self.group_size = prompts_per_step, group_size
        self.max_completion_tokens, self.temperature, self.top_p = max_completion_tokens, temperature, top_p
        self.loss, self.advantage_scale = loss, advantage_scale
        self.clip_low, self.clip_high, self.kl = clip_low, clip_high, kl
        self.updates_per_batch, self.importance_cap = updates_per_batch, importance_cap
        self.mask_truncated, self.seed = mask_truncated, seed
        self.gradient_clip_val: float | None = None
        """Set from trainer.gradient_clip_val, which Lightning itself refuses under manual optimisation."""
        self.gradient_clip_algorithm: str | None = None
        self.token_budget = 8192
        """Set from data.token_budget."""
        self._engine_is_behind = True
        """The student has changed since the engine got its weights."""
        self.rollout_watch: Watch | None = None
        """Is told of rollouts while they are sampled."""

    def sampling(self, *key: object, with_log_probs: bool = True) -> Sampling:
        """How rollouts are drawn; the key names the place they are drawn at."""
        seed = stable_seed(self.seed, *key)
        return Sampling(self.max_completion_tokens, self.temperature, self.top_p, seed, with_log_probs)

    def enter(self, data: ReasoningDataModule) -> int:
        """Every problem that is not mastered by the evidence there is."""
        tokens = self.max_completion_tokens
        load(data, self.student, prompt_limit(self.student, self.engine, tokens, f"{tokens} tokens of a completion"))
        self.token_budget = data.token_budget
        return data.enter(ProblemsToSolve(Place(1, self.stage), self.prompts_per_step))

    def configure_callbacks(self) -> list[Callback]:
        """The data module draws its sets from these very rollouts: what records them is attached where nobody did."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ReasoningDataModule) or records_into(data.ledger, self.trainer):
            return []
        return [RecordRollouts(data.ledger, Place(1, self.stage))]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._freeze_reference()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._freeze_reference()  # what the fit began with, which the checkpoint's weights are about to replace
        super().on_load_checkpoint(checkpoint)

    def on_train_start(self) -> None:
        self._engine_is_behind = True

    def _freeze_reference(self) -> None:
        if self.kl > 0 and not self.student.has_reference:
            self.student.freeze_reference()

    def on_fit_end(self) -> None:
        super().on_fit_end()
        self.student.drop_reference()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        sampling = self.sampling("grpo", self.student.policy_version, self.trainer.current_epoch, batch_idx)
        if self._engine_is_behind:  # not after the update: what the last one leaves on the GPU nobody would sample from
            self.engine.sync(self.student)
            self._engine_is_behind = False
        groups = collect(
            self.student, self.engine, self.reward, batch.problems, self.group_size, sampling, self.rollout_watch
        )
        self.student.tokens.sampled += sum(group.num_tokens for group in groups)
        self._forget_update()
        self._log_rollouts(groups)
        batches = self.policy_batches(groups)
        loss, stepped = 0.0, False
        for _ in range(self.updates_per_batch if batches else 0):
            loss = self._update(batches)
            if self.step_skipped:
                break  # the weights are as they were: so would be the next update
            stepped = True
        if stepped:
            self.student.policy_version += 1
            self._engine_is_behind = True
        return {"loss": _float32(loss, self.device), "rollout_groups": groups}

    # -- the update -------------------------------------------------------------------------------------------------

    def policy_batches(self, groups: Sequence[RolloutGroup]) -> list[PolicyBatch]:
        """Micro-batches of this process's share of the informative groups' completions, normalised over all of them.

        Every process has the same groups and gets the same number of micro-batches: none where none is informative.
        """
        pairs: list[tuple[Rollout, float]] = []
        for group in groups:
            if not group.informative:
                continue
            rewards = _float32([[rollout.reward for rollout in group.rollouts]])
            advantages = group_advantages(rewards, self.advantage_scale)[0].tolist()
            pairs += [
                (rollout, advantage)
                for rollout, advantage in zip(group.rollouts, advantages, strict=True)
                if not (self.mask_truncated and rollout.truncated)
            ]
        tokens = sum(len(rollout.completion_ids) for rollout, _ in pairs)
        examples = [Example(rollout.prompt_ids, rollout.completion_ids, "", "rollout") for rollout, _ in pairs]
        alone = [[index] for index in range(len(pairs))]
        bundles = bundle(examples, self.student.hidden_size, self.device.type) if self.student.shares_prompts else alone
        shares = [bundles[process :: world_size()] for process in range(world_size())]
        plans = [
            plan_batches([bundle_length(examples, members) for members in share], self.token_budget) for share in shares
        ]
        batches = [
            self._policy_batch(pairs, examples, [shares[rank()][i] for i in which], tokens) for which in plans[rank()]
        ]
        # Each process owes as many forward and backward passes as the busiest has.
        missing = max(len(plan) for plan in plans) - len(batches)
        return batches + [self._empty_batch(tokens) for _ in range(missing)]

    def _policy_batch(
        self, pairs: list[tuple[Rollout, float]], examples: list[Example], bundles: list[list[int]], tokens: int
    ) -> PolicyBatch:
        """The micro-batch of some of the bundles, which are lists of positions in `pairs`."""
        mine = [index for members in bundles for index in members]
        place = {index: position for position, index in enumerate(mine)}
        within = [[place[index] for index in members] for members in bundles]
        packed = collate(
            [examples[i] for i in mine],
            self.student.pad_token_id,
            tokens,
            bundles=within,
            hidden_size=self.student.hidden_size,
            device_type=self.device.type,
        )
        packed = packed.to(self.device)
        in_order = [pairs[mine[i]] for i in packed.order]
        lengths = packed.target_lengths
        return PolicyBatch(
            packed,
            _float32([advantage for _, advantage in in_order], self.device).repeat_interleave(lengths),
            token_weights(self.loss, lengths, len(pairs), tokens, self.max_completion_tokens),
            _float32([p for rollout, _ in in_order for p in rollout.sampler_log_probs], self.device),
        )

    def _empty_batch(self, tokens: int) -> PolicyBatch:
        nothing = _float32([], self.device)
        packed = without_targets(self.student.pad_token_id, tokens).to(self.device)
        return PolicyBatch(packed, nothing, nothing, nothing)

    def _update(self, batches: list[PolicyBatch]) -> float:
        """One optimizer step on all micro-batches of a step; its loss over all processes."""
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        sums: dict[str, float] = {}
        for number, batch in enumerate(batches, start=1):
            loss, metrics = self.policy_step(batch)
            with self._gradient_reduction(number == len(batches)):
                # Data parallelism averages over ranks; the weights already are of the global batch.
                self.manual_backward(loss * self.trainer.world_size)
            for name, value in {"loss": float(loss.detach()), **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value
        total, tokens, computed, *others = self.sum_over_processes(
            sums.pop("loss"),
            sum(batch.packed.num_target_tokens for batch in batches),
            sum(batch.packed.num_tokens for batch in batches),
            *sums.values(),
        )
        self.student.tokens.trained += int(computed)
        self.watch(batches, total)
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        means = {f"grpo/{name}": value / tokens for name, value in zip(sums, others, strict=True)}
        self.log_dict({"grpo/loss": total, **means, **self.step_metrics()}, batch_size=int(tokens))
        return total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.gradient_clip_val is not None and not self.step_skipped:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def _gradient_reduction(self, is_last: bool) -> AbstractContextManager[None]:
        """DDP reduces gradients in the last backward pass of a step alone."""
        strategy = self.trainer.strategy
        if is_last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        return strategy.block_backward_sync()

    def loss_of(self, batch: PolicyBatch) -> Tensor:
        return self.policy_step(batch)[0]

    def policy_step(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, float]]:
        """Loss of one micro-batch, and token sums of what is worth logging."""
        if self.kl > 0 and batch.reference_log_probs is None:
            with torch.no_grad(), self.student.evaluating(), self.student.reference():
                batch.reference_log_probs = self.student.score(batch.packed, self.temperature).log_probs
        scores = self.student(batch.packed, self.temperature, with_entropy=True)
        if batch.old_log_probs is None:
            batch.old_log_probs = scores.log_probs.detach()
        correction = None
        if not self._sampler_is_exact:
            correction = truncated_importance(batch.old_log_probs, batch.sampler_log_probs, self.importance_cap)
        loss, clipped = policy_loss(
            scores.log_probs, batch.old_log_probs, batch.advantages, batch.weights, batch.packed.target_lengths,
            self.loss, self.clip_low, self.clip_high, correction,
        )  # fmt: skip
        mismatch = (batch.old_log_probs - batch.sampler_log_probs).abs().sum()
        metrics = {"entropy": float(scores.entropy.sum()), "clipped": float(clipped.sum())}  # type: ignore[union-attr]
        metrics["sampler_mismatch"] = float(mismatch)
        if batch.reference_log_probs is not None:
            penalty = kl_penalty(scores.log_probs, batch.reference_log_probs)
            loss = loss + self.kl * (batch.weights * penalty).sum()
            metrics["kl"] = float(penalty.detach().sum())
        return loss, metrics

    @property
    def _sampler_is_exact(self) -> bool:
        """Whether the engine's log-probs are the trainer's own numbers: never in half precision, where the same product
        in a batch of another shape is rounded otherwise."""
        half = self.student.base_model.dtype != torch.float32 or torch.is_autocast_enabled(self.device.type)
        return self.engine.exact and not half

    def _forget_update(self) -> None:
        """A step without an update has no loss to show: Lightning would show the last one's until the epoch ends."""
        for metric in self.trainer._results.values():  # type: ignore[union-attr] # there while a loop runs
            if metric.meta.fx == "training_step" and not metric.meta.on_epoch:  # callbacks log what they like
                metric.reset()

    def _log_rollouts(self, groups: Sequence[RolloutGroup]) -> None:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        count, size = len(groups), len(rollouts)
        shares = {
            "reward": (sum(r.reward for r in rollouts) / size, True),
            "informative": (sum(g.informative for g in groups) / count, True),
            "all_zero": (sum(g.all_zero for g in groups) / count, False),
            "all_one": (sum(g.all_one for g in groups) / count, False),
            "truncated": (sum(r.truncated for r in rollouts) / size, False),
            "completion_tokens": (sum(len(r.completion_ids) for r in rollouts) / size, False),
        }
        for name, (value, show) in shares.items():
            self.log(f"grpo/{name}", value, prog_bar=show, batch_size=count, on_step=True, on_epoch=True)


def _float32(values: Any, device: torch.device | None = None) -> Tensor:
    """A float32 tensor whatever the default dtype is: Lightning's `bf16-true` makes that bfloat16 within a step."""
    return torch.tensor(values, dtype=torch.float32, device=device)
