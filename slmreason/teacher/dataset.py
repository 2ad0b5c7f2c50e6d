"""The teacher that is the dataset: each problem's own worked solution is its raw trace, and that is all it knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from slmreason.records import Diagnosis, Exemplar, Problem, Reject
from slmreason.teacher.base import Teacher
from slmreason.teacher.procedural import split_steps
from slmreason.teacher.rules import first_false_step
from slmreason.verify.answers import last_boxed

Thoughts = Literal["drop", "keep"]
_TAG = r"(?:think|thinking|thought|reasoning)"
_THOUGHT_START = re.compile(rf"<{_TAG}>|<\|begin_of_thought\|>", re.IGNORECASE)
_THOUGHT_END = re.compile(rf"</{_TAG}>|<\|end_of_thought\|>", re.IGNORECASE)
_SOLUTION_START, _SOLUTION_END = "<|begin_of_solution|>", "<|end_of_solution|>"


class TraceTeacher(Teacher):
    """Answers with the traces that came with the problems, and finds slips of arithmetic. It cannot rewrite or repair.

    A trace whose block of thoughts never closes, or that has nothing behind it, is none; `drain_rejects` tells.
    """

    has_dataset_solutions = True

    def __init__(self, thoughts: Thoughts = "drop") -> None:
        """
        Args:
            thoughts: Of a trace that thinks first (`<think>...</think>`), the solution alone is taken (`drop`), or
                all of it as it is (`keep`).

        Raises:
            ValueError: `thoughts` is neither.
        """
        if thoughts not in ("drop", "keep"):
            raise ValueError(f"teacher.thoughts must be drop or keep, not {thoughts!r}")
        self.thoughts = thoughts
        self._rejects: list[Reject] = []

    def solve(self, problems: Sequence[Problem]) -> list[str | None]:
        return [self._trace(problem) for problem in problems]

    def rewrite(
        self, problems: Sequence[Problem], raw_traces: Sequence[str], exemplars: Sequence[Exemplar]
    ) -> list[str | None]:
        return [None] * len(problems)

    def locate(self, problems: Sequence[Problem], attempts: Sequence[str]) -> list[Diagnosis | None]:
        return [first_false_step(split_steps(attempt)) for attempt in attempts]

    def repair(
        self, problems: Sequence[Problem], prefixes: Sequence[str], diagnoses: Sequence[Diagnosis]
    ) -> list[str | None]:
        return [None] * len(problems)

    def new_trace(self, problems: Sequence[Problem]) -> list[str | None]:
        return self.solve(problems)

    def drain_rejects(self) -> list[Reject]:
        rejects, self._rejects = self._rejects, []
        return rejects

    def _trace(self, problem: Problem) -> str | None:
        try:
            return dataset_solution(problem, self.thoughts)
        except ValueError as error:
            characters = len(problem.trace or "")
            self._rejects.append(Reject(problem.id, "trace", str(error), {"characters": characters}))
            return None


def dataset_solution(problem: Problem, thoughts: Thoughts = "drop") -> str | None:
    """The worked solution that came with a problem, as a completion; None where none came.

    Raises:
        ValueError: one came, and its thoughts never close or nothing follows them.
    """
    if not problem.trace:
        return None
    solution = without_thoughts(problem.trace)
    if solution is None:
        return tidy_trace(problem.trace, problem.answer)
    # A model wrote it, so it may end anywhere: no answer is put into its mouth.
    return solution if thoughts == "drop" else problem.trace.strip()


def without_thoughts(trace: str) -> str | None:
    """What follows the thoughts of a trace (`<think>`, `<|begin_of_thought|>`), its solution; None if it has none.

    The mark that opens them may be missing, because chat templates open them in the prompt.

    Raises:
        ValueError: a block of thoughts or the solution never closes, or the solution is empty.
    """
    ends = [match.end() for match in _THOUGHT_END.finditer(trace)]
    behind = trace[ends[-1] if ends else 0 :]
    if _THOUGHT_START.search(behind):
        raise ValueError("the block of thoughts never closes")
    _, marked, solution = behind.partition(_SOLUTION_START)
    if not ends and not marked:
        return None
    if marked and _SOLUTION_END not in solution:
        raise ValueError("the solution never closes")
    solution = (solution.partition(_SOLUTION_END)[0] if marked else behind).strip()
    if not solution:
        raise ValueError("no solution follows the thoughts")
    return solution


def tidy_trace(trace: str, answer: str) -> str:
    r"""A dataset's solution as a completion: calculator annotations out, the final answer in a box.

    GSM8K's `<<48/2=24>>` is dropped and its `#### 24` line becomes `The answer is \boxed{24}.`; a trace that ends in
    a box already is left as it is.
    """
    plain = re.sub(r"<<[^<>]*>>", "", trace)
    body, mark, final = plain.rpartition("####")
    if mark:
        final = final.strip().partition("\n")[0]  # some repeat it in a last line
        return f"{body.rstrip()}\nThe answer is \\boxed{{{final.strip()}}}."
    if last_boxed(plain) is None:
        return f"{plain.rstrip()}\nThe answer is \\boxed{{{answer}}}."
    return plain.strip()
