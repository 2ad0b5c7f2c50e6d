"""Right and wrong solutions of embedded problems."""

from __future__ import annotations

from slmreason.embedded.families import rebuild, write_solution
from slmreason.records import Problem


def true_solution(problem: Problem) -> str:
    return write_solution([step.text for step in rebuild(problem.id).steps], problem.answer)


def spoiled(problem: Problem, step: int) -> str:
    lines = true_solution(problem).splitlines()
    left, _, value = lines[step].partition("=")
    lines[step] = f"{left}={int(value) + 1}"
    return "\n".join(lines)
