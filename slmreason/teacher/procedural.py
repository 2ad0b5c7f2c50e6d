"""The teacher of the embedded families: it rebuilds the true solution program from the problem's id.

Like a real strong model it writes raw traces that leap (two operations in one line) and digress; unlike one it is
never wrong. Everything it says still goes through the same checks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from slmreason.embedded.families import Program, Step, answer_line, is_embedded_id, rebuild, write_solution
from slmreason.records import Diagnosis, Exemplar, Problem
from slmreason.teacher.base import Teacher
from slmreason.verify.answers import last_boxed
from slmreason.verify.equations import evaluate

_DIGRESSIONS = (
    "Hmm, let me think about this one for a moment.",
    "Wait, I should read the story again to be sure.",
    "One could also draw a table here, but there is no need.",
    "That looks plausible so far, so on we go.",
)


class ProceduralTeacher(Teacher):
    """Knows the solution program of every embedded problem; has no answer for any other."""

    def solve(self, problems: Sequence[Problem]) -> list[str | None]:
        return [_raw_trace(problem.id, program) if program else None for problem, program in _programs(problems)]

    def rewrite(
        self, problems: Sequence[Problem], raw_traces: Sequence[str], exemplars: Sequence[Exemplar]
    ) -> list[str | None]:
        return self.new_trace(problems)

    def locate(self, problems: Sequence[Problem], attempts: Sequence[str]) -> list[Diagnosis | None]:
        return [
            first_wrong_step(program, attempt) if program else None
            for (_, program), attempt in zip(_programs(problems), attempts, strict=True)
        ]

    def repair(
        self, problems: Sequence[Problem], prefixes: Sequence[str], diagnoses: Sequence[Diagnosis]
    ) -> list[str | None]:
        return [
            _continue_from(program, prefix) if program else None
            for (_, program), prefix in zip(_programs(problems), prefixes, strict=True)
        ]

    def new_trace(self, problems: Sequence[Problem]) -> list[str | None]:
        return [
            write_solution([step.text for step in program.steps], program.answer) if program else None
            for _, program in _programs(problems)
        ]


def _programs(problems: Sequence[Problem]) -> list[tuple[Problem, Program | None]]:
    return [(problem, rebuild(problem.id) if is_embedded_id(problem.id) else None) for problem in problems]


def _raw_trace(identifier: str, program: Program) -> str:
    """Two steps folded into one line where they can be, digressions between the lines."""
    rng = random.Random(f"raw/{identifier}")
    lines = [rng.choice(_DIGRESSIONS)]
    steps = list(program.steps)
    while steps:
        step = steps.pop(0)
        if step.value and steps and step.op in "+-" and steps[0].op in "+-":
            follower = steps.pop(0)
            lines.append(f"So {step.left} {step.op} {step.right} {follower.op} {follower.right} = {follower.value}.")
        else:
            lines.append(f"So {step.text}.")
        if rng.random() < 0.5:
            lines.append(rng.choice(_DIGRESSIONS))
    return "\n".join([*lines, answer_line(program.answer)])


def split_steps(attempt: str) -> list[str]:
    """The steps of an attempt: its lines that are not blank."""
    return [line.strip() for line in attempt.splitlines() if line.strip()]


def first_wrong_step(program: Program, attempt: str) -> Diagnosis | None:
    """Compares an attempt with the program, step by step; None when nothing is wrong in it."""
    lines = split_steps(attempt)
    for number, line in enumerate(lines, start=1):
        expected = program.steps[number - 1] if number <= len(program.steps) else None
        complaint = _complaint(line, expected, program)
        if complaint:
            return Diagnosis(number, complaint)
        if last_boxed(line) is not None:
            return None
    missing = len(program.steps) - len(lines)
    reason = f"The attempt stops too early: {missing} more steps are missing." if missing > 0 else "No answer is given."
    return Diagnosis(max(1, len(lines)), reason)


def _complaint(line: str, expected: Step | None, program: Program) -> str | None:
    """Why this line is wrong as the next step; None when it is right."""
    answer = last_boxed(line)
    if answer is not None:
        if expected is not None:
            return f"The answer comes too early. Next is {expected.text}."
        return None if answer.strip() == program.answer else f"The steps give {program.answer}, not {answer.strip()}."
    if expected is None:
        return f"This step is not needed. The answer is {program.answer}."
    if _says(line, expected):
        return None
    left, equals, right = line.partition("=")
    value = evaluate(left)
    if equals and value is not None and value != evaluate(right):
        shown = value.numerator if value.denominator == 1 else value
        return f"{left.strip()} is {shown}, not {right.strip()}."
    return f"This does not follow from the story. Next is {expected.text}."


def _says(line: str, step: Step) -> bool:
    """The line states this step: the same text, or for + and * the operands in the other order."""
    squeezed = line.replace(" ", "")
    swapped = Step(step.right, step.op, step.left, step.value)
    return squeezed == step.text.replace(" ", "") or (step.op in "+*" and squeezed == swapped.text.replace(" ", ""))


def _continue_from(program: Program, prefix: str) -> str:
    done = len(split_steps(prefix))
    return write_solution([step.text for step in program.steps[done:]], program.answer)
