"""What a run still does, about: for those who watch it.

A set may shrink, a stage may be skipped, and `curriculum.max_tokens` may end the run earlier. Before anything has been
measured nobody knows how large the sets will be, and nothing is foretold.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from slmreason.curriculum.curve import CurvePoints
from slmreason.curriculum.heldout import HeldOut
from slmreason.curriculum.prober import Prober
from slmreason.curriculum.scorer import Scorer
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.curriculum.stages import Stage
from slmreason.curriculum.traces import longest_traces
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.posterior import informative_rate
from slmreason.data.strata import acquisition_set, consolidation_set, stratify
from slmreason.modules.sampling import LEAST_SHARE
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Place
from slmreason.run.whole import Part, Plan, Portion
from slmreason.supervision.critique import CritiqueSettings
from slmreason.supervision.settings import BridgeSettings


@dataclass(frozen=True)
class SetSizes:
    """How many problems the sets of the next epoch have, by what is known now."""

    taught: int
    """SFT: medium and hard ones."""
    tried: int
    """GRPO: those with a right rollout short of mastery, and a review of the others."""
    missing: int
    """Those that were never sampled."""
    unsolved: int
    """Those without a right rollout."""
    failing: float
    """Of those tried, the groups without a right rollout that are to be expected: they are critiqued."""
    informative: float
    """Share of the groups of those tried that will have a difference in reward."""

    @classmethod
    def of(cls, data: ReasoningDataModule, group_size: int) -> SetSizes | None:
        """None where nothing has been measured, and sets go by difficulty."""
        if not len(data.ledger) and data.routing != "all":
            return None
        strata = data.routed(stratify(data.ledger, data.problems, data.bands))
        tried = consolidation_set(strata, data.review_share, random.Random(0))
        counts = data.ledger.counts(tried)
        rho = np.divide(counts.right, counts.total, out=np.full(len(tried), 0.5), where=counts.total > 0)
        return cls(
            taught=len(acquisition_set(strata)),
            tried=len(tried),
            missing=sum(problem.id not in data.ledger for problem in data.problems),
            unsolved=len(data.problems) - len(strata.solved),
            failing=float(((1 - rho) ** group_size).sum()),
            informative=float(informative_rate(rho, group_size).mean()) if len(tried) else 0.0,
        )


def groups_of_epoch(settings: GRPOSettings, tried: int, informative: float) -> float:
    """Groups that an epoch of GRPO samples, about.

    Without a cooldown refills are drawn from the same set, and the epoch ends when it is used up; with one a problem
    comes back, and every step has its refills.

    Args:
        tried: problems of the set.
        informative: share of groups that are.
    """
    cap = settings.max_sampled_groups
    if cap is None or settings.cooldown is None:
        return tried
    a_step = min(cap, settings.prompts_per_step / max(informative, LEAST_SHARE))
    return math.ceil(tried / settings.prompts_per_step) * a_step


@dataclass(frozen=True)
class RunForecast:
    """What the stages of a run do, by its settings and by what has been measured so far."""

    settings: CurriculumSettings
    stages: Mapping[str, Stage]
    data: ReasoningDataModule
    prober: Prober
    scorer: Scorer
    curve: CurvePoints
    held_out: HeldOut | None
    bridge: BridgeSettings
    critique: CritiqueSettings

    def __call__(self, number: int) -> list[Plan] | None:
        """See `slmreason.run.whole.Forecast`."""
        sizes = SetSizes.of(self.data, self.prober.grpo.group_size)
        if sizes is None:
            return None
        plans = [self.plan(place, sizes) for place in [Place(0, "base"), *self.settings.places][number:]]
        longest = self.scorer.settings.max_new_tokens
        return [{**plans[0], "curve": Portion(self.curve.completions_ahead, longest)}, *plans[1:]]

    def plan(self, place: Place, sizes: SetSizes) -> Plan:
        """What one stage does."""
        made: dict[Part, Portion] = {}
        if place.stage != "base":
            made = {"sft": self._sft, "grpo": self._grpo, "cft": self._cft}[place.stage](place, sizes)
        if self.held_out is not None and self.settings.stages:
            made["validation"] = Portion(self._validated(place, self.held_out), self.prober.grpo.max_completion_tokens)
        if self._is_scored(place):
            made["benchmarks"] = Portion(self.scorer.completions, self.scorer.settings.max_new_tokens)
        return made

    def _sft(self, place: Place, sizes: SetSizes) -> dict[Part, Portion]:
        pool, epochs = len(self.data.problems), self._epochs(place)
        stale = pool - sizes.tried if place.round > 1 and self.prober.settings.refresh == "stale" else 0
        return {
            "probe": self._measured(place, sizes.missing + stale if self._measures else 0),
            "traces": Portion(sizes.taught, longest_traces(self.bridge, self.prober.grpo)),
            "fit": Portion(sizes.taught * epochs),
            "again": self._measured(place, pool * self.prober.settings.epoch_share * epochs),
        }

    def _grpo(self, place: Place, sizes: SetSizes) -> dict[Part, Portion]:
        grpo, refresh = self.prober.grpo, self.prober.settings.refresh
        known = self.prober.settings.epoch_share if "sft" in self.settings.stages else 0.0
        before = {"stale": len(self.data.problems) * (1 - known), "unsolved": float(sizes.unsolved)}
        rollouts = groups_of_epoch(grpo, sizes.tried, sizes.informative) * grpo.group_size * self._epochs(place)
        return {
            "probe": self._measured(place, before.get(refresh, sizes.missing) if self._measures else 0),
            "fit": Portion(rollouts, grpo.max_completion_tokens),
        }

    def _cft(self, place: Place, sizes: SetSizes) -> dict[Part, Portion]:
        rounds = self._epochs(Place(place.round, "grpo")) if "grpo" in self.settings.stages else 0
        groups, epochs = sizes.failing * rounds, self._epochs(place)
        of_a_kind = groups * self.critique.attempts_per_problem
        if self.critique.max_per_kind is not None:
            of_a_kind = min(of_a_kind, self.critique.max_per_kind)
        return {
            "critiques": Portion(groups),
            "fit": Portion(of_a_kind * len(self.critique.kinds) * epochs),
            "again": self._measured(place, groups * epochs),
        }

    def _measured(self, place: Place, problems: float) -> Portion:
        """Problems that are sampled outside GRPO, as far as measuring may take tokens by the end of the round."""
        prober, completions = self.prober, problems * self.prober.settings.attempts
        mean = self.data.ledger.mean_tokens
        if prober.may_take is not None and mean:
            allowed = prober.may_take(place.round) - sum(each.tokens for each in prober.bought)
            completions = min(completions, max(0.0, allowed) / mean)
        return Portion(completions, prober.grpo.max_completion_tokens)

    def _validated(self, place: Place, held_out: HeldOut) -> int:
        """Completions of held-out problems between two fits."""
        kept = 1 if place.stage == "base" else 0
        samples = held_out.validation.settings.samples
        compared = 1 + (samples if samples > 1 else 0) if self.settings.keep == "best" else 0
        return len(held_out.problems) * (kept + compared)

    @property
    def _measures(self) -> bool:
        return self.prober.settings.refresh != "never"

    def _epochs(self, place: Place) -> int:
        return self.stages[place.stage].module.settings.epochs

    def _is_scored(self, place: Place) -> bool:
        settings = self.settings
        ends_round = place.stage == settings.stages[-1] if settings.stages else False
        is_last = not settings.stages or (place.round, place.stage) == (settings.rounds, settings.stages[-1])
        wanted = {"stage": True, "round": ends_round, "ends": is_last}
        return place.stage == "base" or wanted[settings.evaluate]
