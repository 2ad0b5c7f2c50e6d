"""The benchmarks of a run: the student's answers after a stage, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence

from slmreason.curriculum.state import StageReport
from slmreason.curriculum.work import Work
from slmreason.evaluate.benchmarks import Benchmark, EvaluationSettings, Sample, evaluate, save_scores
from slmreason.records import Problem, RolloutGroup
from slmreason.run.folder import RunFolder
from slmreason.verify.rewards import RewardFn


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
        settings, key = self.settings, f"benchmarks after {report.place.label}{note}"
        with self.work.watching(key, self.completions, settings.max_new_tokens) as watch:

            def in_parts(problems: Sequence[Problem], sample: Sample) -> list[RolloutGroup]:
                groups = self.work.in_batches(key, problems, sample, RolloutGroup, settings.samples, watch)
                report.benchmark_tokens = sum(group.num_tokens for group in groups)
                return groups

            answers = self.files.answers(report.place.label)
            report.scores = evaluate(
                self.work.student, self.work.engine, self.reward, self.benchmarks, settings, watch, answers, in_parts
            )
            report.benchmark_seconds = watch.seconds
        save_scores(self.files.benchmarks, report.place.label, report.scores)
