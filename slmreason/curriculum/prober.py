"""Measuring rho outside GRPO: before a stage, and again where an epoch may have changed it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from slmreason.curriculum.settings import ProbeSettings
from slmreason.curriculum.work import Work
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Evidence, Place, Problem
from slmreason.rollout.collect import collect
from slmreason.run.progress import duration
from slmreason.verify.rewards import RewardFn

log = logging.getLogger(__name__)


class Prober:
    """Draws rollouts as GRPO draws them, and leaves what they show in the ledger."""

    def __init__(
        self,
        work: Work,
        data: ReasoningDataModule,
        grpo: GRPOSettings,
        reward: RewardFn,
        settings: ProbeSettings,
        max_tokens: int | None,
    ) -> None:
        """
        Args:
            grpo: whose sampling is that of the rollouts.
            max_tokens: of the run; see `CurriculumSettings.max_tokens`.
        """
        self.work, self.data, self.grpo, self.reward = work, data, grpo, reward
        self.settings, self.max_tokens = settings, max_tokens

    def before(self, place: Place, last_grpo_began: int | None) -> None:
        """Measures where the evidence is stale or missing.

        Args:
            last_grpo_began: the policy version at which the newest GRPO fit began.
        """
        ledger, refresh, student = self.data.ledger, self.settings.refresh, self.work.student
        if refresh == "never":
            return
        oldest = student.policy_version
        if refresh == "missing" or (refresh == "unsolved" and place.stage == "sft"):
            oldest = 0
        elif place.stage == "sft" and last_grpo_began is not None:
            oldest = last_grpo_began

        def wanted(problem: Problem) -> bool:
            newest = ledger.get(problem.id)
            if newest is None or newest.policy_version >= oldest:
                return newest is None
            return refresh != "unsolved" or newest.successes == 0

        self.measure([p for p in self.data.problems if wanted(p)], place, f"round {place.round} probe")

    def again(self, place: Place, problems: Sequence[Problem] | None = None) -> None:
        """Measures what the epoch that ends may have changed.

        Args:
            place: with the epoch.
            problems: whose rho that is; a share of the pool when not given.
        """
        if problems is None:
            size = round(len(self.data.problems) * self.settings.epoch_share)
            problems = self.data.rng("reprobe", place.round, place.epoch).sample(self.data.problems, size)
        self.measure(problems, place, f"round {place.round} {place.stage} re-measure")

    def measure(self, problems: Sequence[Problem], place: Place, label: str) -> None:
        """Samples each problem, and takes what comes out into the ledger; what an earlier process did is not repeated.

        Args:
            label: for those who watch, and for the journal.
        """
        attempts, student = self.settings.attempts, self.work.student
        if not problems or not self._is_affordable(len(problems) * attempts, label):
            return
        self.work.engine.sync(student)
        sampling = self.grpo.sampling("probe", place.round, place.stage, student.policy_version, with_log_probs=False)
        key = f"{label} epoch {place.epoch} policy {student.policy_version}"
        with self.work.watching(label, len(problems) * attempts, sampling.max_new_tokens) as watch:

            def make(chunk: list[Problem]) -> list[Evidence]:
                groups = collect(student, self.work.engine, self.reward, chunk, attempts, sampling, watch)
                student.tokens.sampled += sum(group.num_tokens for group in groups)
                return [Evidence.of(group) for group in groups]

            found = self.work.in_batches(key, problems, make, Evidence, attempts, watch)
        self.data.ledger.take(found, place)
        right = sum(evidence.successes for evidence in found)
        sampled = sum(evidence.attempts for evidence in found)
        tokens = sum(evidence.tokens for evidence in found)
        log.info("%s: rho %.2f over %d problems, %d tokens in %s", label, right / sampled, len(found), tokens,
                 duration(watch.seconds))  # fmt: skip

    def completions(self, place: Place, epochs: int, is_first: bool) -> int:
        """What measuring for a stage samples, about.

        Args:
            epochs: of the stage.
            is_first: nothing has been measured before it.
        """
        pool, attempts, share = len(self.data.problems), self.settings.attempts, self.settings.epoch_share
        measures = self.settings.refresh != "never"
        if place.stage == "sft":
            return round(pool * attempts * (is_first * measures + share * epochs))
        if place.stage == "grpo" and self.settings.refresh == "stale":
            return round(pool * attempts * (1 - share))
        return 0

    def _is_affordable(self, completions: int, label: str) -> bool:
        """False when measuring would take more than half of the tokens that are left: older evidence must do."""
        if self.max_tokens is None:
            return True
        cost = completions * self.data.ledger.mean_tokens
        left = self.max_tokens - self.work.student.tokens.total
        if cost > left / 2:
            log.info("%s: left out, it would take %.0f of the last %d tokens", label, cost, max(0, left))
        return cost <= left / 2
