"""The checks that a text passes before a student is trained on it, and what each fault is called."""

from __future__ import annotations

import re

from slmreason.records import Diagnosis, Fault, Problem
from slmreason.student import Student
from slmreason.teacher.dataset import dataset_solution
from slmreason.verify.equations import false_equations
from slmreason.verify.rewards import RewardFn
from slmreason.verify.verdicts import verdict_on

TOO_LONG = "too long"
WRONG_ANSWER = "final answer does not verify"
FALSE_EQUATION = "false equation"
NO_SOLUTION = "the dataset has no solution of it"
NOT_USABLE = "the dataset's solution cannot be used"
BY_HEART = "known by heart"
COPIED = "copies the solution it was shown"
MENTIONED = "speaks of the solution it was shown"
NO_DIAGNOSIS = "no diagnosis"
CALLED_RIGHT = "the diagnosis calls a wrong answer right"
NO_SUCH_STEP = "the diagnosis names a step that does not exist"
NO_REPAIR = "no repair"
NO_NEW_TRACE = "no new trace"
SHOWN = (COPIED, MENTIONED)
"""What is wrong with a right solution that was written with another before its writer's eyes."""

_ADJECTIVE = r"(?:given|provided|reference|worked|above)"  # not "original": a solution of salt has that too
_MENTION = re.compile(
    rf"\b{_ADJECTIVE} (?:solution|explanation)s?\b"
    rf"|\b(?:solution|explanation)s? {_ADJECTIVE}\b"
    r"|\baccording to the (?:solution|explanation)\b"
    r"|\bthe solution (?:says|states|shows|tells)\b"
    r"|\b(?:in|into) (?:my|your) own words\b"
    r"|\bas if i had not seen\b",
    re.IGNORECASE,
)


def trace_fault(problem: Problem, text: str, num_tokens: int, max_tokens: int, reward: RewardFn) -> Fault | None:
    """Why a worked solution may not be trained on; None when it may.

    Args:
        num_tokens: of the text as a target of the student.
        max_tokens: a longer text is rejected.
    """
    if num_tokens > max_tokens:
        return Fault(TOO_LONG, f"{num_tokens} tokens, the cap is {max_tokens}")
    if not verdict_on(reward, problem, text).correct:
        return Fault(WRONG_ANSWER)
    wrong = false_equations(text)
    return Fault(FALSE_EQUATION, wrong[0]) if wrong else None


def usable_solution(problem: Problem, student: Student, max_tokens: int, reward: RewardFn) -> str | Fault:
    """The worked solution that came with a problem, or why a student may not be trained on it.

    Args:
        max_tokens: a longer one, as a target of the student, is rejected.
    """
    try:
        text = dataset_solution(problem)
    except ValueError as error:
        return Fault(NOT_USABLE, str(error))
    if not text:
        return Fault(NO_SOLUTION)
    return trace_fault(problem, text, len(student.encode_target(text)), max_tokens, reward) or text


def shown_fault(text: str, solution: str) -> Fault | None:
    """Why a text that was written with the help of a solution says no more than it, or gives the help away.

    Args:
        solution: the student was shown it, or began with its first lines.

    Returns:
        A fault where the text has all of the solution's lines, its last one aside, which may only say the answer; or
        where it mentions having been given a solution. None where it does neither.
    """
    lines = solution.strip().splitlines()
    steps = _spaced("\n".join(lines[:-1] or lines))
    if steps in _spaced(text):
        return Fault(COPIED)
    mention = _MENTION.search(text)
    return Fault(MENTIONED, mention.group()) if mention else None


def _spaced(text: str) -> str:
    """The text with one space wherever it has white space."""
    return " ".join(text.split())


def diagnosis_fault(diagnosis: Diagnosis | None, prefix: str | None) -> Fault | None:
    """Why a diagnosis may not be trained on; None when it may.

    Args:
        prefix: the attempt before the step that the diagnosis names; None when there is no such step.
    """
    if diagnosis is None:
        return Fault(NO_DIAGNOSIS)
    if diagnosis.verdict == "right":
        return Fault(CALLED_RIGHT)
    return Fault(NO_SUCH_STEP) if prefix is None else None
