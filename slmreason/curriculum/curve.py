"""A run's accuracy against its tokens: the benchmarks at each of `curriculum.budgets`, where the tokens pass it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from slmreason.callbacks import MeasureAtBudgets
from slmreason.curriculum.scorer import Measured, Scorer
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.curriculum.state import StageReport
from slmreason.evaluate.benchmarks import Score
from slmreason.records import Place
from slmreason.run.files import append_records, read_lines
from slmreason.run.folder import RunFolder

log = logging.getLogger(__name__)


class CurvePoints:
    """Measures the student between two optimizer steps, and changes nothing of the run: no random number, no count."""

    def __init__(
        self,
        scorer: Scorer,
        settings: CurriculumSettings,
        files: RunFolder,
        show_scores: Callable[[Sequence[Score]], None],
    ) -> None:
        """
        Args:
            show_scores: tells the loggers of the run.
        """
        self.scorer, self.files, self.limit, self.show_scores = scorer, files, settings.max_tokens, show_scores
        self.student = scorer.work.student
        self.ahead = [0, *settings.budgets] if settings.budgets else []
        """Budgets that have not been measured yet; 0 is the base."""
        self.seconds = 0.0
        """What measuring has taken within the stage at hand."""

    def go_on(self) -> None:
        """Takes what was measured before the point that the run goes on at."""
        done = {row["budget"] for row in read_lines(self.files.curve)}
        self.ahead = [budget for budget in self.ahead if budget not in done]

    @property
    def completions_ahead(self) -> int:
        """What measuring will still sample, if every budget is reached."""
        own = [budget for budget in self.ahead if budget and (self.limit is None or budget < self.limit)]
        return len(own) * self.scorer.completions

    def callbacks(self, place: Place) -> list[MeasureAtBudgets]:
        """What a fit needs for it."""
        return [MeasureAtBudgets(lambda: self.measure(place))] if self.ahead else []

    def measure(self, place: Place) -> None:
        """Runs the benchmarks if the tokens have passed a budget; not at the end of the run, where they are run anyway.

        Args:
            place: the stage that the student is in.
        """
        passed, spent = self._passed(), self.student.tokens.total
        if not passed or (self.limit is not None and spent >= self.limit):
            return
        name = f"{passed[-1]} tokens"
        answers = self.files.answers(name)
        with isolate_rng(), torch.no_grad():
            measured = self.scorer.measure(f"benchmarks at {name}", answers, "curve")
        self.seconds += measured.seconds
        self._note(passed, place, answers, measured)
        self.show_scores(measured.scores)

    def take(self, report: StageReport) -> None:
        """Takes the benchmarks after a stage for the budgets that were passed by its end."""
        if report.scores and (passed := self._passed()):
            measured = Measured(report.scores, report.benchmark_tokens, report.benchmark_seconds)
            self._note(passed, report.place, self.files.answers(report.place.label), measured)

    def tell_unreached(self) -> None:
        """Says which budgets the run did not reach."""
        if self.ahead:
            log.info("curriculum.budgets: the run ended at %d tokens, before %s", self.student.tokens.total,
                     ", ".join(map(str, self.ahead)))  # fmt: skip

    def _passed(self) -> list[int]:
        return [budget for budget in self.ahead if budget <= self.student.tokens.total]

    def _note(self, passed: Sequence[int], place: Place, answers: Path, measured: Measured) -> None:
        """Writes a line for each budget."""
        tokens = self.student.tokens
        self.ahead = self.ahead[len(passed) :]
        append_records(self.files.curve, [
            {"budget": budget, "stage": place.label, "tokens": tokens.as_summary(),
             "answers": str(answers.relative_to(self.files.path)), "scores": [asdict(s) for s in measured.scores],
             "benchmark_tokens": measured.tokens}
            for budget in passed
        ])  # fmt: skip
        accuracy = " ".join(f"{score.benchmark} {100 * score.value:.1f}" for score in measured.scores)
        log.info("%s, at %d tokens: %s | benchmarks %.0f s", place.label, tokens.total, accuracy, measured.seconds)
