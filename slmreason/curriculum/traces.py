"""Making what the student is trained on: traces by the Bridge, and critiques; nothing is made twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slmreason.curriculum.work import Work
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.grpo import GRPOModule
from slmreason.records import BridgeCandidate, BridgeResult, Critique, Place, Problem, RolloutGroup, Trace
from slmreason.rollout.engine import Sampling, stable_seed
from slmreason.run.files import read_records
from slmreason.run.folder import RunFolder
from slmreason.run.progress import Watch
from slmreason.supervision.bridge import BY_HEART, BridgeSettings, bridge, reverified
from slmreason.supervision.critique import CritiqueSettings, critique
from slmreason.teacher.base import Teacher
from slmreason.verify.rewards import RewardFn

CRITIQUED_AT_A_TIME = 64
"""Harvested groups; a teacher that is asked over a network takes a second or so for each of their attempts."""


class TraceMaker:
    """Asks the teacher, verifies what it says, and notes what has been made."""

    def __init__(
        self,
        work: Work,
        data: ReasoningDataModule,
        grpo: GRPOModule,
        reward: RewardFn,
        teacher: Teacher,
        bridge_settings: BridgeSettings,
        critique_settings: CritiqueSettings,
        given_traces: Mapping[str, Trace],
    ) -> None:
        """
        Args:
            grpo: whose seed and limit hand-overs are sampled with.
            given_traces: of `slmreason bridge`, by the pool's ids; their problems' traces are taken from here.
        """
        self.work, self.data, self.grpo, self.reward, self.teacher = work, data, grpo, reward, teacher
        self.bridge_settings, self.critique_settings = bridge_settings, critique_settings
        self.given_traces = given_traces
        self._known: list[Trace] = []

    def recall(self, files: RunFolder, place: Place) -> None:
        """Reads what the teacher wrote in the rounds before this place, so that it is not asked again.

        Rewrites that are wrong are left out: those it may do better now.
        """
        paths = [files.stage(Place(number, "sft")).bridge for number in range(1, place.round)]
        results = [result for path in paths if path.exists() for result in read_records(path, BridgeResult)]
        candidates = [candidate for result in results for candidate in result.candidates]
        self._known = [candidate.trace for candidate in candidates if _is_worth_keeping(candidate)]

    def bridge(
        self, place: Place, problems: Sequence[Problem], settings: BridgeSettings, critiques: Sequence[Critique]
    ) -> list[BridgeResult]:
        """A trace for each problem, or none.

        Args:
            settings: `bridge_settings`, or the same for problems that are not bridged.
            critiques: of the round before, whose new traces are candidates.
        """
        ids = stable_seed(settings.select, *(problem.id for problem in problems))
        key = f"{place.label} bridge {ids} policy {self.work.student.policy_version}"
        with self.work.watching(f"{place.label} traces", len(problems), settings.max_trace_tokens) as watch:
            return self.work.journal.chunks(
                key, problems, lambda chunk: self._bridge(place, chunk, settings, critiques, watch), BridgeResult,
                self.work.at_a_time(1), watch.skip,
            )  # fmt: skip

    def _bridge(
        self,
        place: Place,
        problems: Sequence[Problem],
        settings: BridgeSettings,
        critiques: Sequence[Critique],
        watch: Watch,
    ) -> list[BridgeResult]:
        student, ledger = self.work.student, self.data.ledger
        known = [problem for problem in problems if problem.id in self.given_traces]
        results = [reverified(p, self.given_traces[p.id], student, self.reward, settings) for p in known]
        problems = [problem for problem in problems if problem.id not in self.given_traces]
        sampling = Sampling(
            max_new_tokens=min(settings.max_trace_tokens, self.grpo.settings.max_completion_tokens),
            temperature=0.0,
            seed=stable_seed(self.grpo.settings.seed, "handover", place.round, student.policy_version),
            with_log_probs=False,
        )
        new = [Trace(record.problem.id, record.new_trace, "bridged") for record in critiques if record.new_trace]
        return results + bridge(
            problems,
            student,
            self.work.engine,
            self.teacher,
            self.reward,
            settings,
            sampling,
            exemplars=ledger.exemplars(self.data.problems, self.data.band_of),
            more=new + ledger.own_traces(problems),
            known=self._known,
            token_budget=self.data.token_budget,
            watch=watch,
        )

    def critiques(self, groups: Sequence[RolloutGroup]) -> list[Critique]:
        """Records of the failed attempts of harvested groups."""
        student = self.work.student

        def make(chunk: list[RolloutGroup]) -> list[Critique]:
            return critique(chunk, self.teacher, student, self.reward, self.critique_settings)

        key = f"critique {stable_seed(*(group.problem.id for group in groups))} policy {student.policy_version}"
        return self.work.journal.chunks(key, groups, make, Critique, self.work.chunk_or(CRITIQUED_AT_A_TIME))


def _is_worth_keeping(candidate: BridgeCandidate) -> bool:
    """Whether the teacher need not write it again: it is raw, or right."""
    is_right = candidate.rejected is None or candidate.rejected.startswith(BY_HEART)
    return is_right or candidate.trace.provenance == "teacher"
