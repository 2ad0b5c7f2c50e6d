"""Measuring rho outside GRPO: before a stage, and again where an epoch may have changed it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from slmreason.curriculum.bought import Bought
from slmreason.curriculum.predictor import Predictor
from slmreason.curriculum.settings import ProbeSettings
from slmreason.curriculum.waves import StoppingRule
from slmreason.curriculum.work import Work
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.posterior import Posterior
from slmreason.data.strata import stratify
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Band, Evidence, Place, Problem
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.run.progress import Watch
from slmreason.run.whole import Part, duration
from slmreason.verify.rewards import RewardFn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Probe:
    """One measurement: where in the run it is, and how its rollouts are drawn."""

    key: str
    place: Place
    sampling: Sampling
    watch: Watch


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
        may_take: Callable[[int], float] | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        """
        Args:
            grpo: whose sampling is that of the rollouts.
            max_tokens: of the run; see `CurriculumSettings.max_tokens`.
            may_take: round -> tokens that measuring may have taken by its end, all rounds together; None for no bound
                (`CurriculumSettings.probe_tokens`).
            predictor: spares problems whose band is certain without rollouts; None samples all.
        """
        self.work, self.data, self.grpo, self.reward = work, data, grpo, reward
        self.settings, self.max_tokens, self.may_take = settings, max_tokens, may_take
        self.predictor = predictor
        self.rule = StoppingRule(settings.attempts, data.bands, settings.screen)
        self.bought: list[Bought] = []
        """What measuring took so far, in this run."""

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
        self._measure_all(place, problems, f"round {place.round} {place.stage} re-measure", "again")

    def measure(self, problems: Sequence[Problem], place: Place, label: str) -> None:
        """Samples each problem that the predictor does not spare, and takes what comes out into the ledger; what an
        earlier process did is not repeated.

        Args:
            label: for those who watch, and for the journal.
        """
        predictor = self.predictor
        if predictor is None or not problems or not self._is_worth_predicting(problems, place, label):
            self._measure_all(place, problems, label)
            return
        unscored = predictor.unscored()
        tokens = predictor.score(unscored, place, label)
        self.bought.append(Bought(
            place.round, place.stage, f"{label} traces", wanted=len(unscored), problems=len(unscored), rollouts=0,
            tokens=tokens, first_bands=0, moved=0,
        ))  # fmt: skip
        is_bounded = self.may_take is not None
        spared = predictor.lead(problems, place, label, partial(self._measure_all, place), is_bounded)
        predictor.tell(place, label, len(unscored), tokens, spared)

    def _is_worth_predicting(self, problems: Sequence[Problem], place: Place, label: str) -> bool:
        """False, and said, when so few are to be measured or so few tokens are left that no trace is scored."""
        assert self.predictor is not None
        why = self.predictor.lacks(len(problems))
        if why is None:
            cost, room = self.predictor.cost(self.predictor.unscored()), float("inf")
            if self.may_take is not None:
                room = self._allowed(place)
            elif self.max_tokens is not None:
                room = (self.max_tokens - self.work.student.tokens.total) / 2
            if cost > room / 2:
                why = f"that would read {cost} tokens, half of what measuring may take are {max(0.0, room) / 2:.0f}"
        if why is not None:
            log.info("%s: no trace is scored: %s", label, why)
        return why is None

    def _measure_all(self, place: Place, problems: Sequence[Problem], label: str, part: Part = "probe") -> int:
        """Samples each of these problems, as far as there are tokens for it.

        Args:
            part: of the stage, for those who watch.

        Returns:
            How many there were tokens for.
        """
        attempts, student = self.settings.attempts, self.work.student
        is_bounded = self.may_take is not None
        if not problems or not (is_bounded or self._is_affordable(len(problems) * attempts, label)):
            return 0
        before, allowed = self._bands(), self._allowed(place)
        self.work.engine.sync(student)
        sampling = self.grpo.sampling("probe", place.round, place.stage, student.policy_version, with_log_probs=False)
        key = f"{label} epoch {place.epoch} policy {student.policy_version}"
        watching = self.work.watching(label, len(problems) * attempts, sampling.max_new_tokens, part)
        with self.work.spending("probe"), watching as watch:
            probe = _Probe(key, place, sampling, watch)
            found = self._buy(problems, probe, allowed) if is_bounded else self._sample(problems, probe, key)
        bought = self._note(label, place, len(problems), found, before)
        if is_bounded:
            log.info("%s", bought.describe(max(0.0, allowed)))
        if not found:
            self._say_if_nothing_is_known(allowed, sampling.max_new_tokens)
            return 0
        right = sum(evidence.successes for evidence in found)
        sampled = sum(evidence.attempts for evidence in found)
        tokens = sum(evidence.tokens for evidence in found)
        log.info("%s: rho %.2f over %d problems, %d tokens in %s", label, right / sampled, len(found), tokens,
                 duration(watch.seconds))  # fmt: skip
        return len(found)

    def _sample(self, problems: Sequence[Problem], probe: _Probe, key: str) -> list[Evidence]:
        """Draws the rollouts of each problem, all at once or in waves, and takes what they show into the ledger."""
        waves = self.settings.waves
        if waves is None:
            found = self._wave(problems, probe, key, self.settings.attempts)
        else:
            found = self._in_waves(problems, probe, key, waves)
        self.data.ledger.take(found, probe.place)
        return found

    def _in_waves(self, problems: Sequence[Problem], probe: _Probe, key: str, waves: Sequence[int]) -> list[Evidence]:
        """Each wave goes over all problems that need it, so that the engine's batches stay full."""
        attempts = self.settings.attempts
        shown: dict[int, Evidence] = {}
        needy = list(range(len(problems)))
        belief = self.predictor.belief(problems) if self.predictor is not None else None
        for part, size in enumerate(waves, start=1):
            asked = [problems[index] for index in needy]
            found = self._wave(asked, probe, f"{key} wave {part}", size, sum(waves[: part - 1]), part)
            for index, evidence in zip(needy, found, strict=True):
                shown[index] = shown[index].with_more(evidence) if index in shown else evidence
            stopped = self._stopped(needy, shown, belief)
            probe.watch.skip(sum(attempts - shown[index].attempts for index in stopped))
            needy = sorted(set(needy) - set(stopped))
            if not needy:
                break
        return [shown[index] for index in range(len(problems))]

    def _stopped(self, needy: Sequence[int], shown: Mapping[int, Evidence], belief: Posterior | None) -> list[int]:
        """Those of the needy that no further wave is needed for.

        Args:
            shown: what their rollouts showed so far.
            belief: of each problem before these rollouts; None where only the rule decides.
        """
        stopped = [index for index in needy if self.rule.stops(shown[index].successes, shown[index].attempts)]
        if belief is None or self.predictor is None:
            return stopped
        right = np.array([shown[index].successes for index in needy])
        wrong = np.array([shown[index].attempts for index in needy]) - right
        places = list(needy)
        certain = self.predictor.are_certain(Posterior(belief.a[places] + right, belief.b[places] + wrong))
        return sorted({*stopped, *(index for index, sure in zip(needy, certain, strict=True) if sure)})

    def _wave(
        self, problems: Sequence[Problem], probe: _Probe, key: str, size: int, first: int = 0, part: int = 0
    ) -> list[Evidence]:
        """
        Args:
            size: rollouts of each problem.
            first: rollouts that each problem had before.
            part: see `Notes.chunks`.
        """
        student, sampling = self.work.student, replace(probe.sampling, first=first)

        def make(chunk: list[Problem]) -> list[Evidence]:
            groups = collect(student, self.work.engine, self.reward, chunk, size, sampling, probe.watch)
            student.tokens.sampled += sum(group.num_tokens for group in groups)
            return [Evidence.of(group) for group in groups]

        return self.work.in_batches(key, problems, make, Evidence, size, probe.watch, part)

    def _buy(self, problems: Sequence[Problem], probe: _Probe, allowed: float) -> list[Evidence]:
        """Samples, piece by piece, as many problems as there are tokens for, the least known first."""
        settings = self.settings
        order = self._by_need(problems, probe.place)
        most = self.work.at_a_time(settings.waves[0] if settings.waves else settings.attempts)
        found: list[Evidence] = []
        spent = 0
        while len(found) < len(order):
            each = settings.attempts * (self.data.ledger.mean_tokens or probe.sampling.max_new_tokens)
            size = min(most, int((allowed - spent) / each))
            if size < 1:
                break
            new = self._sample(order[len(found) :][:size], probe, f"{probe.key} from {len(found)}")
            spent += sum(evidence.tokens for evidence in new)
            found += new
        return found

    def _note(
        self, label: str, place: Place, wanted: int, found: Sequence[Evidence], before: Mapping[str, Band]
    ) -> Bought:
        """Notes what a measurement took and changed.

        Args:
            wanted: problems that were to be measured.
            before: the band of each problem that had one.
        """
        after = self._bands()
        bought = Bought(
            round=place.round,
            stage=place.stage,
            label=label,
            wanted=wanted,
            problems=len(found),
            rollouts=sum(evidence.attempts for evidence in found),
            tokens=sum(evidence.tokens for evidence in found),
            first_bands=len(after.keys() - before.keys()),
            moved=sum(after[name] != band for name, band in before.items()),
        )
        self.bought.append(bought)
        return bought

    def _say_if_nothing_is_known(self, allowed: float, longest: int) -> None:
        """A run that may not even measure one problem has no set to train on."""
        if not len(self.data.ledger):
            log.warning(
                "curriculum.probe.share leaves %.0f tokens, and one problem may take %d (%d rollouts of up to %d): "
                "nothing is measured, so there is nothing to train on; set a larger share or curriculum.max_tokens",
                max(0.0, allowed), self.settings.attempts * longest, self.settings.attempts, longest,
            )  # fmt: skip

    def _bands(self) -> dict[str, Band]:
        return stratify(self.data.ledger, self.data.problems, self.data.bands).band_of

    def _allowed(self, place: Place) -> float:
        """Tokens that measuring may still take by the end of this round; never more than half of what the run has left,
        where measuring is bounded."""
        if self.may_take is None:
            return float("inf")
        spent = sum(each.tokens for each in self.bought)
        left = float("inf") if self.max_tokens is None else (self.max_tokens - self.work.student.tokens.total) / 2
        return min(self.may_take(place.round) - spent, left)

    def _by_need(self, problems: Sequence[Problem], place: Place) -> list[Problem]:
        """Those first that were never sampled, then those whose band is least certain, or whose evidence is oldest."""
        order = list(problems)
        self.data.rng("probe", place.round, place.stage, place.epoch).shuffle(order)
        ledger = self.data.ledger
        certainty = stratify(ledger, self.data.problems, self.data.bands).certainty

        def known(problem: Problem) -> tuple[bool, float]:
            newest = ledger.get(problem.id)
            if newest is None:
                return False, certainty.get(problem.id, 0.0)
            return True, certainty.get(problem.id, newest.policy_version)

        return sorted(order, key=known)

    def _is_affordable(self, completions: int, label: str) -> bool:
        """False when measuring would take more than half of the tokens that are left: older evidence must do."""
        if self.max_tokens is None:
            return True
        cost = completions * self.data.ledger.mean_tokens
        left = self.max_tokens - self.work.student.tokens.total
        if cost > left / 2:
            log.info("%s: left out, it would take %.0f of the last %d tokens", label, cost, max(0, left))
        return cost <= left / 2
