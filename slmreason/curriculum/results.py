"""What a run came to: the benchmarks after its stages, the summary, and what is printed at its end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from slmreason.curriculum.bought import as_summary
from slmreason.curriculum.scorer import Scorer
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.curriculum.state import RunState, StageReport
from slmreason.evaluate.benchmarks import Score
from slmreason.records import Place
from slmreason.report.terminal import print_tables, scores_table
from slmreason.run.files import write_text
from slmreason.run.folder import RunFolder
from slmreason.runtime.redact import shown

log = logging.getLogger(__name__)


class Results:
    """Has the student scored where that is due, and tells what came out."""

    def __init__(
        self,
        scorer: Scorer,
        settings: CurriculumSettings,
        files: RunFolder,
        console: Console,
        show_scores: Callable[[Sequence[Score]], None],
    ) -> None:
        """
        Args:
            show_scores: tells the loggers of the run.
        """
        self.scorer, self.settings, self.files, self.console = scorer, settings, files, console
        self.show_scores = show_scores

    def is_due(self, place: Place, outcome: str, is_last: bool) -> bool:
        """Whether the benchmarks are run after a stage.

        Args:
            outcome: of the stage.
            is_last: the run ends with it.
        """
        ends_round = place.stage == self.settings.stages[-1]
        wanted = {"stage": True, "round": ends_round or is_last, "ends": is_last}
        return wanted[self.settings.evaluate] and (outcome == "done" or is_last)

    def score(self, run: RunState, note: str = "") -> None:
        """The benchmarks after the newest stage, if they are due, and the summary of the run so far."""
        report = run.reports[-1]
        if run.evaluate and self.scorer.benchmarks:
            self.scorer.score(report, note)
            self.show_scores(report.scores)
        run.evaluate = False
        before = run.reports[-2].tokens.total if len(run.reports) > 1 else 0
        log.info("%s", report.describe(report.tokens.total - before))
        summary = [_summary(report, run) for report in run.reports]
        write_text(self.files.summary, json.dumps(summary, indent=1) + "\n")

    def show(self, reports: Sequence[StageReport]) -> None:
        """Accuracy on each benchmark, for the base and after each stage that was evaluated; then what else there is."""
        rows: list[tuple[str, Sequence[Score]]] = [(each.place.label, each.scores) for each in reports if each.scores]
        if rows:
            print_tables(self.console, scores_table("greedy pass@1 in %, 95 % interval", rows))
        for line in (*remarks(reports), f"student: {self.files.student}"):
            self.console.print(shown(line), soft_wrap=True, markup=False, highlight=False)


def _summary(report: StageReport, run: RunState) -> dict[str, Any]:
    """A stage's entry in summary.json, with what was measured for it, and predicted."""
    bought, predicted = run.bought_for(report.place), [each.as_summary() for each in run.predictions_for(report.place)]
    others = {"measured": as_summary(bought), "predicted": predicted}
    return {**report.as_summary(), **{name: found for name, found in others.items() if found}}


def remarks(reports: Sequence[StageReport]) -> list[str]:
    """What the table does not say: which stages were not done, and what the run did where nothing was scored."""
    others = [f"{report.place.label}: {report.outcome}" for report in reports if report.outcome != "done"]
    if any(report.scores for report in reports):
        return others
    done = sum(report.outcome == "done" for report in reports[1:])
    seconds, tokens = sum(report.seconds for report in reports), reports[-1].tokens
    scored = f", {tokens.scored:,} read to predict rho" if tokens.scored else ""
    did = (
        f"no benchmark was run (benchmarks is empty); {done} of {len(reports) - 1} stages done in {seconds:.0f} s with "
        f"{tokens.total:,} tokens: {tokens.sampled:,} sampled, {tokens.trained:,} trained on, {tokens.written:,} "
        f"written by the teacher{scored}"
    )
    return [did, *others]
