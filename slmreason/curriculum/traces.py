"""Making what the student is trained on: traces by the Bridge, and critiques; nothing is made twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slmreason.curriculum.work import Work, settling
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.settings import GRPOSettings
from slmreason.records import BridgeCandidate, BridgeResult, Critique, Place, Problem, RolloutGroup, Trace
from slmreason.rollout.engine import Sampling, stable_seed
from slmreason.run.files import read_records
from slmreason.run.folder import RunFolder
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import map_over_processes
from slmreason.supervision.bridge import Bridge, Material
from slmreason.supervision.checks import BY_HEART
from slmreason.supervision.critique import Critic
from slmreason.supervision.settings import BridgeSettings

CRITIQUED_AT_A_TIME = 64
"""Harvested groups; a teacher that is asked over a network takes a second or so for each of their attempts."""


class TraceMaker:
    """Runs the Bridge and the critic over many problems, and notes what has been made."""

    def __init__(
        self,
        work: Work,
        data: ReasoningDataModule,
        grpo: GRPOSettings,
        bridge: Bridge,
        critic: Critic,
        given_traces: Mapping[str, Trace],
    ) -> None:
        """
        Args:
            grpo: whose seed and limit hand-overs are sampled with.
            given_traces: of `slmreason bridge`, by the pool's ids; their problems' traces are taken from here.
        """
        self.work, self.data, self.grpo, self.critic = work, data, grpo, critic
        self.bridge, self.raw = bridge, bridge.raw()
        self.given_traces = given_traces
        self._written: list[Trace] = []

    def recall(self, files: RunFolder, place: Place) -> None:
        """Reads what the teacher wrote in the rounds before this place, so that it is not asked again.

        Rewrites that are wrong are left out: those it may do better now.
        """
        paths = [files.stage(Place(number, "sft")).bridge for number in range(1, place.round)]
        results = [result for path in paths if path.exists() for result in read_records(path, BridgeResult)]
        candidates = [candidate for result in results for candidate in result.candidates]
        self._written = [candidate.trace for candidate in candidates if _is_worth_keeping(candidate)]

    def chosen(self, files: RunFolder, place: Place) -> dict[str, str]:
        """By problem id the newest trace that SFT had, up to this place; where it had none the given one, if it passes.

        Every process must ask for it: given traces are verified, shared out.
        """
        paths = [files.stage(Place(number, "sft")).bridge for number in range(1, place.round + 1)]
        results = [result for path in paths if path.exists() for result in read_records(path, BridgeResult)]
        results = self._reverified(self.data.problems) + results
        return {result.problem.id: result.chosen.text for result in results if result.chosen is not None}

    def _reverified(self, problems: Sequence[Problem]) -> list[BridgeResult]:
        given = [problem for problem in problems if problem.id in self.given_traces]

        def verified(share: list[Problem]) -> list[BridgeResult]:
            return [self.bridge.reverified(problem, self.given_traces[problem.id]) for problem in share]

        return map_over_processes(verified, given)

    def traces(
        self, place: Place, problems: Sequence[Problem], bridged: bool, critiques: Sequence[Critique] = ()
    ) -> list[BridgeResult]:
        """A trace for each problem, or none.

        Args:
            bridged: else the raw traces are verified, and nothing else is proposed.
            critiques: of the round before, whose new traces are candidates.
        """
        bridge = self.bridge if bridged else self.raw
        ids = stable_seed(bridge.settings.select, *(problem.id for problem in problems))
        key = f"{place.label} bridge {ids} policy {self.work.student.policy_version}"
        label, longest = f"{place.label} traces", longest_traces(bridge.settings, self.grpo)
        watching = self.work.watching(label, len(problems), longest, "traces", "problems")
        with self.work.spending("bridge"), watching as watch:

            def make(chunk: list[Problem]) -> list[BridgeResult]:
                return self._make(place, chunk, bridge, critiques, watch)

            # As many as the engine holds: problems that are bridged together share bridge.max_sampled_tokens.
            size = self.work.at_a_time(1)
            made = settling(make, watch)
            return self.work.notes.chunks(key, problems, made, BridgeResult, size=size, noted=watch.skip)

    def critiques(self, groups: Sequence[RolloutGroup]) -> list[Critique]:
        """Records of the failed attempts of harvested groups."""
        ids = stable_seed(*(group.problem.id for group in groups))
        key = f"critique {ids} policy {self.work.student.policy_version}"
        size = self.work.chunk_or(CRITIQUED_AT_A_TIME)
        watching = self.work.watching("critiques", len(groups), 0, "critiques", "groups")
        with self.work.spending("critiques"), watching as watch:
            make = settling(self.critic.make, watch)
            return self.work.notes.chunks(key, groups, make, Critique, size=size, noted=watch.skip)

    def _make(
        self,
        place: Place,
        problems: Sequence[Problem],
        bridge: Bridge,
        critiques: Sequence[Critique],
        watch: Watch,
    ) -> list[BridgeResult]:
        given = [problem for problem in problems if problem.id in self.given_traces]
        others = [problem for problem in problems if problem.id not in self.given_traces]
        results = [bridge.reverified(problem, self.given_traces[problem.id]) for problem in given]
        ledger = self.data.ledger
        of_critiques = [Trace(c.problem.id, c.new_trace, "bridged") for c in critiques if c.new_trace]
        material = Material(
            exemplars=ledger.exemplars(self.data.problems, self.data.band_of),
            traces=of_critiques + ledger.own_traces(others),
            written=self._written,
        )
        return results + bridge.make(others, self._sampling(place), material, watch)

    def _sampling(self, place: Place) -> Sampling:
        """How the student continues a hand-over; what the Bridge samples has this seed and its own temperature."""
        longest = _longest(self.bridge.settings, self.grpo)
        seed = stable_seed(self.grpo.seed, "handover", place.round, self.work.student.policy_version)
        return Sampling(max_new_tokens=longest, temperature=0.0, seed=seed, with_log_probs=False)


def longest_traces(settings: BridgeSettings, grpo: GRPOSettings) -> int:
    """Tokens that the student samples for the trace of a problem, if each completion of it is as long as it may be.

    `bridge.handover_search` is taken to end with its first number of steps. 0 where nothing is sampled.
    """
    if not settings.select:
        return 0
    handovers = settings.handover_samples if settings.handover_search else int(settings.handover)
    return (handovers + settings.rationalise) * _longest(settings, grpo)


def _longest(settings: BridgeSettings, grpo: GRPOSettings) -> int:
    return min(settings.max_trace_tokens, grpo.max_completion_tokens)


def _is_worth_keeping(candidate: BridgeCandidate) -> bool:
    """Whether the teacher need not write it again: it is raw, or right."""
    is_right = candidate.rejected is None or candidate.rejected.kind == BY_HEART
    return is_right or candidate.trace.provenance == "teacher"
