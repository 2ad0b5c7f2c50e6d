"""What the curriculum asks of a teacher, so that a program, a dataset or a stronger model can play the part.

Every method takes a batch and answers in the same order; None stands for "no answer", which the caller counts and
shows. Nothing a teacher says is believed: the Bridge and the critique builder verify it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from slmreason.records import Diagnosis, Exemplar, Problem, Reject
from slmreason.runtime.distributed import first_only


class Teacher(ABC):
    """A source of traces, rewrites, diagnoses and repairs."""

    has_dataset_solutions: bool = False
    """Whether what it solves with are the solutions that came with the problems; else the Bridge adds those itself."""

    @abstractmethod
    def solve(self, problems: Sequence[Problem]) -> list[str | None]:
        """A raw trace of each problem, in the teacher's own manner."""

    @abstractmethod
    def rewrite(
        self, problems: Sequence[Problem], raw_traces: Sequence[str], exemplars: Sequence[Exemplar]
    ) -> list[str | None]:
        """Each raw trace again, one operation a step, nothing skipped, in the student's format.

        Args:
            exemplars: right solutions of the student itself, to show its style; may be empty.
        """

    @abstractmethod
    def locate(self, problems: Sequence[Problem], attempts: Sequence[str]) -> list[Diagnosis | None]:
        """The first wrong step of each failed attempt, and why it is wrong."""

    @abstractmethod
    def repair(
        self, problems: Sequence[Problem], prefixes: Sequence[str], diagnoses: Sequence[Diagnosis]
    ) -> list[str | None]:
        """What must follow each correct prefix to reach the right answer."""

    @abstractmethod
    def new_trace(self, problems: Sequence[Problem]) -> list[str | None]:
        """A complete fresh solution of each problem."""

    def check(self) -> None:  # noqa: B027 - most are here already
        """Finds out whether it can be asked at all, before a run does what is lost on one that cannot.

        Raises:
            TeacherError: it cannot; the message says why, and which key to change.
        """

    def estimate(self, requests: Mapping[str, Sequence[Problem]]) -> str | None:
        """What it would cost to be asked for these (by method name), in words; None when nothing is paid for."""
        return None

    def drain_rejects(self) -> list[Reject]:
        """Why there was no answer, for each answer that there was not since the last call. A teacher may not say."""
        return []


class FirstProcessTeacher(Teacher):
    """Asks another teacher from the first of several processes alone, and tells them all: nothing is paid for twice."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.has_dataset_solutions = teacher.has_dataset_solutions

    def solve(self, problems: Sequence[Problem]) -> list[str | None]:
        return first_only(lambda: self.teacher.solve(problems))

    def rewrite(
        self, problems: Sequence[Problem], raw_traces: Sequence[str], exemplars: Sequence[Exemplar]
    ) -> list[str | None]:
        return first_only(lambda: self.teacher.rewrite(problems, raw_traces, exemplars))

    def locate(self, problems: Sequence[Problem], attempts: Sequence[str]) -> list[Diagnosis | None]:
        return first_only(lambda: self.teacher.locate(problems, attempts))

    def repair(
        self, problems: Sequence[Problem], prefixes: Sequence[str], diagnoses: Sequence[Diagnosis]
    ) -> list[str | None]:
        return first_only(lambda: self.teacher.repair(problems, prefixes, diagnoses))

    def new_trace(self, problems: Sequence[Problem]) -> list[str | None]:
        return first_only(lambda: self.teacher.new_trace(problems))

    def check(self) -> None:
        first_only(self.teacher.check)

    def estimate(self, requests: Mapping[str, Sequence[Problem]]) -> str | None:
        return self.teacher.estimate(requests)

    def drain_rejects(self) -> list[Reject]:
        return first_only(self.teacher.drain_rejects)
