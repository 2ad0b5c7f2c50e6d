"""The teacher that is the dataset: each problem's own worked solution is its raw trace, and that is all it knows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from slmreason.records import Diagnosis, Problem, RolloutGroup
from slmreason.teacher.teacher import Teacher
from slmreason.verify.answers import last_boxed


class TraceTeacher(Teacher):
    """Answers with the traces that came with the problems. It cannot rewrite, diagnose or repair."""

    def solve(self, problems: Sequence[Problem]) -> list[str | None]:
        return [tidy_trace(problem.trace, problem.answer) if problem.trace else None for problem in problems]

    def rewrite(
        self, problems: Sequence[Problem], raw_traces: Sequence[str], exemplars: Sequence[RolloutGroup]
    ) -> list[str | None]:
        return [None] * len(problems)

    def locate(self, problems: Sequence[Problem], attempts: Sequence[str]) -> list[Diagnosis | None]:
        return [None] * len(problems)

    def repair(
        self, problems: Sequence[Problem], prefixes: Sequence[str], diagnoses: Sequence[Diagnosis]
    ) -> list[str | None]:
        return [None] * len(problems)

    def new_trace(self, problems: Sequence[Problem]) -> list[str | None]:
        return self.solve(problems)


def tidy_trace(trace: str, answer: str) -> str:
    r"""A dataset's solution as a completion: calculator annotations out, the final answer in a box.

    GSM8K's `<<48/2=24>>` is dropped and its `#### 24` line becomes `The answer is \boxed{24}.`; a trace that ends in
    a box already is left as it is.
    """
    plain = re.sub(r"<<[^<>]*>>", "", trace)
    body, mark, final = plain.rpartition("####")
    if mark:
        return f"{body.rstrip()}\nThe answer is \\boxed{{{final.strip()}}}."
    if last_boxed(plain) is None:
        return f"{plain.rstrip()}\nThe answer is \\boxed{{{answer}}}."
    return plain.strip()
