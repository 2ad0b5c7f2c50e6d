"""The benchmarks of a run: the student's answers after a stage, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slmreason.curriculum.state import StageReport
from slmreason.curriculum.work import Work
from slmreason.evaluate.benchmarks import Benchmark, EvaluationSettings, Sample, Score, evaluate, save_scores
from slmreason.records import Problem, RolloutGroup
from slmreason.run.folder import RunFolder
from slmreason.run.whole import Part
from slmreason.verify.rewards import RewardFn


@dataclass(frozen=True)
class Measured:
    """The benchmarks of a student as it stood."""

    scores: list[Score]
    tokens: int
    """That it answered them with; no budget counts them."""
    seconds: float


class Scorer:
    """Runs the benchmarks, greedily, and keeps every answer."""

    def __init__(
        self,
        work: Work,
        reward: RewardFn,
        benchmarks: Sequence[Benchmark],
        evaluation: EvaluationSettings,
        files: RunFolder,
    ) -> None:
        self.work, self.reward, self.benchmarks = work, reward, benchmarks
        self.settings, self.files = evaluation.greedy(), files

    @property
    def completions(self) -> int:
        """What one run of all benchmarks samples."""
        return sum(len(benchmark.problems) for benchmark in self.benchmarks) * self.settings.samples

    def score(self, report: StageReport, note: str = "") -> None:
        """Puts the scores of the student as it stands into a stage's report, and what they cost.

        Args:
            note: tells the benchmarks of a stage that was cut short from those after its end.
        """
        label = report.place.label
        measured = self.measure(f"benchmarks after {label}{note}", self.files.answers(label))
        report.scores = measured.scores
        report.benchmark_tokens, report.benchmark_seconds = measured.tokens, measured.seconds
        save_scores(self.files.benchmarks, label, report.scores)

    def measure(self, key: str, answers: Path, part: Part = "benchmarks") -> Measured:
        """Runs the benchmarks on the student as it stands.

        Args:
            key: names the work, and says when it is done.
            answers: the file of every answer.
            part: of the stage, for those who watch.
        """
        settings, tokens = self.settings, 0
        with self.work.watching(key, self.completions, settings.max_new_tokens, part) as watch:

            def in_parts(problems: Sequence[Problem], sample: Sample) -> list[RolloutGroup]:
                nonlocal tokens
                groups = self.work.in_batches(key, problems, sample, RolloutGroup, settings.samples, watch)
                tokens = sum(group.num_tokens for group in groups)
                return groups

            scores = evaluate(
                self.work.student, self.work.engine, self.reward, self.benchmarks, settings, watch, answers, in_parts
            )
            return Measured(scores, tokens, watch.seconds)
