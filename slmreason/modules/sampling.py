"""The groups of a GRPO step: which problems are drawn, and what is drawn in place of silent groups."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from slmreason.data.order import DrawnBatch, Draws, make_order
from slmreason.data.posterior import Posterior
from slmreason.modules.base import StudentModule
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Problem, RolloutGroup
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import RolloutEngine
from slmreason.run.progress import Watch
from slmreason.student import Student
from slmreason.student.packing import PromptBatch
from slmreason.verify.rewards import RewardFn

log = logging.getLogger(__name__)
LEAST_SHARE = 0.25
"""Of informative groups that a refill counts on: it asks for four times what is missing at most."""


class SamplingModule(StudentModule):
    """Samples the groups that a step trains on."""

    settings: GRPOSettings

    def __init__(self, student: Student, engine: RolloutEngine, reward: RewardFn, settings: GRPOSettings) -> None:
        super().__init__(student, settings)
        self.engine, self.reward = engine, reward
        self.rollout_watch: Watch | None = None
        """Is told of rollouts while they are sampled."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        settings = self.settings
        order = make_order(settings.order, settings.group_size)
        self.draws = Draws(order, settings.cooldown) if settings.draws_at_each_step else None
        """None where the steps of an epoch are cut beforehand."""
        self._has_said_capped = False

    @property
    def comes_back(self) -> bool:
        """Whether a problem may be drawn more than once an epoch, so that refills make it longer."""
        return self.draws is not None and self.draws.cooldown is not None

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> int | None:
        """Ends the epoch where refills have used up its set."""
        if self.draws is None or not isinstance(batch, DrawnBatch) or not self.draws.is_used_up(batch):
            return None
        log.info("grpo: refills have used up the set of %d problems: the epoch ends after %d of %s steps",
                 len(batch.problems), batch_idx, self.trainer.num_training_batches)  # fmt: skip
        return -1

    def on_train_end(self) -> None:
        """Says how often the same problems came back, where they may."""
        super().on_train_end()
        if self.draws is not None and self.comes_back:
            log.info("grpo.cooldown %s: %s", self.draws.cooldown, self.draws.describe())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.draws is not None:
            checkpoint["draws"] = self.draws.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.draws is not None and "draws" in checkpoint:
            self.draws.load_state_dict(checkpoint["draws"])

    def sample_groups(self, batch: PromptBatch, batch_idx: int) -> list[RolloutGroup]:
        """The groups of a step, silent ones too; every process gets all of them."""
        if self.draws is None or not isinstance(batch, DrawnBatch):
            return self._sample(batch.problems, batch_idx)
        groups = self._sample(self.draws.first(batch, self._posterior), batch_idx)
        began_with, refills = len(groups), 0
        while more := self.draws.more(batch, self._wanted(batch, groups), self._posterior):
            refills += 1
            groups += self._sample(more, batch_idx, "refill", refills)
        self._say_if_capped(batch, groups)
        self.draws.order.observe(groups)
        sampled = {"grpo/sampled_groups": float(len(groups)), "grpo/refilled": float(len(groups) - began_with)}
        shown = sampled | {f"grpo/order/{name}": value for name, value in self.draws.order.metrics().items()}
        self.log_dict(shown, batch_size=1, on_step=True, on_epoch=True)
        return groups

    def _sample(self, problems: Sequence[Problem], batch_idx: int, *key: object) -> list[RolloutGroup]:
        version, epoch = self.student.policy_version, self.trainer.current_epoch
        groups = collect(
            self.student,
            self.engine,
            self.reward,
            problems=problems,
            group_size=self.settings.group_size,
            sampling=self.settings.sampling("grpo", version, epoch, batch_idx, *key),
            watch=self.rollout_watch,
        )
        self.student.tokens.sampled += sum(group.num_tokens for group in groups)
        return groups

    def _posterior(self, problems: Sequence[Problem]) -> Posterior:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        posterior: Posterior = data.ledger.posterior(problems, among=data.problems)
        return posterior

    def _wanted(self, batch: DrawnBatch, groups: Sequence[RolloutGroup]) -> int:
        """How many further problems will probably make the step whole, under the cap.

        By the groups alone and not by the engine's room: the same draws on every machine.
        """
        informative = sum(group.informative for group in groups)
        missing = batch.count - informative
        room = self._cap(batch) - len(groups)
        if missing <= 0 or room <= 0:
            return 0
        share = max(informative / len(groups), LEAST_SHARE)
        return min(math.ceil(missing / share), room)

    def _cap(self, batch: DrawnBatch) -> int:
        """Groups of a step at most; 0 without refills."""
        # A batch holds prompts_per_step times the micro-batches that are accumulated.
        return (self.settings.max_sampled_groups or 0) * batch.count // self.settings.prompts_per_step

    def _say_if_capped(self, batch: DrawnBatch, groups: Sequence[RolloutGroup]) -> None:
        """Says it the first time in a fit: `grpo/informative` has the share of every step."""
        informative = sum(group.informative for group in groups)
        if self._has_said_capped or informative >= batch.count or not 0 < self._cap(batch) <= len(groups):
            return
        self._has_said_capped = True
        share = 100 * informative / len(groups)
        log.info("grpo.max_sampled_groups is reached: %d of %d groups (%.0f %%) are informative, %d were wanted: "
                 "the step trains on these", informative, len(groups), share, batch.count)  # fmt: skip
