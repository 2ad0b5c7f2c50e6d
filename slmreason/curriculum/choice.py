"""Which student a stage hands on: the one that its fit has made, or the one that it began with where that is better."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from slmreason.callbacks import LogDivergence
from slmreason.curriculum.heldout import KL, HeldOut
from slmreason.curriculum.resume import load_weights, newest_checkpoint
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.curriculum.state import RunState, StageReport
from slmreason.student import Student

log = logging.getLogger(__name__)


class Choice:
    """Validates the student after each stage, and takes back the weights of before where `curriculum.keep` is best."""

    def __init__(self, held_out: HeldOut | None, settings: CurriculumSettings, student: Student) -> None:
        """
        Args:
            held_out: None where the run is not validated.
        """
        self.held_out, self.settings, self.student = held_out, settings, student
        self._divergence: float | None = None
        """Of the fit that has just ended."""

    def callbacks(self) -> list[LogDivergence]:
        """What a fit needs for it."""
        return [LogDivergence(self._diverged)] if self.held_out is not None else []

    def _diverged(self) -> float:
        assert self.held_out is not None
        self._divergence = self.held_out.divergence()
        return self._divergence

    def begin(self, run: RunState) -> None:
        """Validates the base, and keeps completions of it to compare with."""
        if self.held_out is None or not self.settings.stages:
            return
        self.held_out.keep_base()
        if self.settings.keep == "best":
            run.validated = self.held_out.metrics("base")
            run.reports[-1].validated = dict(run.validated)

    def end(self, run: RunState) -> None:
        """Validates what the newest stage has made of the student, and decides whether that is handed on."""
        report = run.reports[-1]
        if self.held_out is None or report.outcome != "done":
            return
        if self._divergence is not None:
            report.validated[KL], self._divergence = self._divergence, None
        if self.settings.keep == "last":
            return
        now, before = self.held_out.metrics(report.place.label), run.validated
        report.validated |= now
        name = metric_of(report.place.stage, self.settings, self.held_out.validation.settings.samples)
        if before[name] > now[name]:
            self._take_back()
            report.kept = "before"
        else:
            run.validated, report.kept = now, "new"
        self._tell(report, name, before[name], now[name])

    def _take_back(self) -> None:
        """Gives the student the weights that the stage began with, as another student than any evidence is of."""
        found = newest_checkpoint(self.held_out.files.path, after_stage=True) if self.held_out else None
        assert found is not None  # there is one after the base
        load_weights(found[0], self.student)
        self.student.policy_version += 1

    @staticmethod
    def _tell(report: StageReport, name: str, before: float, now: float) -> None:
        which = "the weights of before are kept" if report.kept == "before" else "the new weights are kept"
        log.info("%s: %s %.3f, before it %.3f: %s", report.place.label, name, now, before, which)


def metric_of(stage: str, settings: CurriculumSettings, samples: int) -> str:
    """The metric by which a stage's students are compared: pass@k after SFT, since GRPO can use what one of k solves.

    Args:
        samples: further completions of a held-out problem.
    """
    chosen: Mapping[str, str] = settings.keep_by or {}
    return chosen.get(stage, f"val/pass@{samples}" if stage == "sft" else "val/pass@1")


def check_choice(settings: CurriculumSettings, samples: int, is_validated: bool) -> None:
    """
    Args:
        samples: further completions of a held-out problem; 1 for none.
        is_validated: there are problems that are never trained on.

    Raises:
        ValueError: the students of a stage cannot be compared; the message names the key to set.
    """
    if settings.keep == "last":
        return
    if not is_validated:
        raise ValueError("curriculum.keep: best compares students on problems that are never trained on; set "
                         "data.holdout or data.validation")  # fmt: skip
    known = ["val/pass@1", *([f"val/pass@{samples}"] if samples > 1 else [])]
    for stage in dict.fromkeys(settings.stages):
        name = metric_of(stage, settings, samples)
        if stage == "sft" and samples == 1 and "sft" not in (settings.keep_by or {}):
            raise ValueError("curriculum.keep: best compares pass@k after SFT: set validation.samples, such as 8, or "
                             "curriculum.keep_by {sft: val/pass@1}")  # fmt: skip
        if name not in known:
            more = "" if not re.fullmatch(r"val/pass@\d+", name) else "; validation.samples is the k"
            raise ValueError(f"curriculum.keep_by: {stage}: there is no {name}, but {' and '.join(known)}{more}")
