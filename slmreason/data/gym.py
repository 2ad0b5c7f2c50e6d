"""reasoning-gym's generators as a source of problems."""

from __future__ import annotations

from slmreason.data.reading import Loaded
from slmreason.records import Problem, Reject, check_text
from slmreason.verify.gym import is_scorable
from slmreason.verify.gym_maker import Made, made


def gym_problems(source: str, limit: int | None) -> Loaded:
    """The problems of `reasoning_gym:NAME?size=N&difficulty=1,2&OPTION=VALUE`, the difficulties in rotation.

    A question that stands twice is rejected the second time, and so is a problem without an answer of its own.

    Raises:
        ValueError: the package is not installed, or knows no such generator or option.
    """
    name = source.partition("?")[0]
    problems: dict[str, Problem] = {}
    rejects = []
    for each in made(source, limit):
        try:
            problem = _problem(each, name)
            if problem.question in problems:
                raise ValueError(f"the question stands twice: {problems[problem.question].id} asks it too, and is kept")
        except ValueError as error:
            rejects.append(Reject(each.id, name, str(error)))
        else:
            problems[problem.question] = problem
    return Loaded(name, tuple(problems.values()), tuple(rejects))


def _problem(each: Made, source: str) -> Problem:
    """
    Raises:
        ValueError: it is no problem; the message says why.
    """
    if each.fault is not None:
        raise ValueError(each.fault)
    for what, text in (("question", each.question), ("answer", each.answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the generator names no {what}: it is {text!r}")
        check_text(text, f"the {what}")
    if not is_scorable(each.answer):
        raise ValueError(f"the answer is too long to be scored: {len(each.answer)} characters")
    return Problem(each.id, each.question.strip(), each.answer.strip(), source=source)
