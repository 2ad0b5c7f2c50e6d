"""reasoning-gym's generators as a source of problems."""

from __future__ import annotations

from slmreason.data.reading import Loaded
from slmreason.records import Problem, Reject, check_text
from slmreason.verify.gym import PREFIX, GymFamily, dataset, families


def gym_problems(source: str, limit: int | None) -> Loaded:
    """The problems of `reasoning_gym:NAME?size=N&difficulty=1,2&OPTION=VALUE`, the difficulties in rotation.

    A question that stands twice is rejected the second time.

    Raises:
        ValueError: the package is not installed, or knows no such generator or option.
    """
    found = families(source)
    for family in found:
        dataset(family)  # which says what is wrong with the source, not with a row
    problems: dict[str, Problem] = {}
    rejects = []
    for count, (family, place) in enumerate(_places(found)):
        if limit is not None and count >= limit:
            break
        identifier = f"{family.key}#{place}"
        try:
            problem = _problem(family, place, identifier)
        except ValueError as error:
            rejects.append(Reject(identifier, source, str(error)))
            continue
        if problem.question in problems:
            rejects.append(Reject(identifier, source, f"the question stands twice: {problems[problem.question].id}"))
        else:
            problems[problem.question] = problem
    return Loaded(source, tuple(problems.values()), tuple(rejects))


def _places(of: list[GymFamily]) -> list[tuple[GymFamily, int]]:
    places = [(family, place) for family in of for place in range(family.size)]
    return sorted(places, key=lambda each: each[1])


def _problem(family: GymFamily, place: int, identifier: str) -> Problem:
    generator = dataset(family)
    try:
        entry = generator[place]
    except Exception as error:  # whatever a generator does with its dials
        raise ValueError(f"the generator failed: {type(error).__name__}: {error}") from error
    question, answer = entry["question"], entry["answer"]
    if not isinstance(question, str) or not question.strip() or not isinstance(answer, str) or not answer.strip():
        raise ValueError("the generator gave no question or no answer: its scorer may take several, and names none")
    check_text(question + answer, "the question or the answer")
    return Problem(identifier, question.strip(), answer.strip(), source=f"{PREFIX}{family.name}")
