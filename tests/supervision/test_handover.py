"""The least help: how few steps of a solution are enough, whoever continues from them."""

from __future__ import annotations

from math import ceil, log2

import pytest

from slmreason.records import Problem
from slmreason.supervision.handover import Handover, Help, Search, first_steps, least_help, one_round


def problem(number: int) -> Problem:
    return Problem(f"p-{number}", f"What is {number}?", str(number))


def solution(steps: int) -> str:
    return "\n".join(f"step {number}" for number in range(1, steps + 1))


def steps_in(handover: Handover) -> int:
    return len(handover.prefix.splitlines())


@pytest.mark.parametrize("most_first", [False, True])
@pytest.mark.parametrize("leave", [1, 2])
@pytest.mark.parametrize("steps", range(1, 18))
def test_the_least_help_is_found_in_as_many_rounds_as_a_bisection_takes(
    steps: int, leave: int, most_first: bool
) -> None:
    most = max(0, steps - leave)
    for enough in range(1, most + 2):
        tried: list[int] = []

        def continue_from(
            handovers: list[Handover], enough: int = enough, tried: list[int] = tried
        ) -> list[str | None]:
            [handover] = handovers
            tried.append(steps_in(handover))
            return [f"behind {tried[-1]}" if tried[-1] >= enough else None]

        search = Search[str](problem(0), solution(steps), leave, most_first)
        while search.is_open:
            one_round([search], continue_from)
        assert search.found == (Help(enough, enough / steps, f"behind {enough}") if enough <= most else None)
        assert len(tried) <= ceil(log2(most + 1)) + most_first
        assert len(set(tried)) == len(tried)
        assert all(1 <= each <= most for each in tried)
        if most_first and most:
            assert tried[0] == most


def test_all_that_are_open_share_a_round_and_what_is_decided_leaves() -> None:
    rounds: list[list[str]] = []

    def continue_from(handovers: list[Handover]) -> list[bool | None]:
        rounds.append([handover.problem.id for handover in handovers])
        return [True] * len(handovers)

    found = least_help([problem(n) for n in range(3)], [solution(2), solution(16), solution(4)], continue_from)
    assert [each.steps if each else None for each in found] == [1, 1, 1]
    assert rounds == [["p-0", "p-1", "p-2"], ["p-1", "p-2"], ["p-1"], ["p-1"]]


def test_the_search_ends_with_what_it_has_when_it_may_not_go_on() -> None:
    asked = iter([True, True, False])
    found = least_help(
        [problem(0), problem(1)],
        [solution(17), solution(17)],
        lambda handovers: ["yes" if each.problem.id == "p-0" else None for each in handovers],
        may_go_on=lambda: next(asked),
    )
    assert found[0] == Help(5, 5 / 17, "yes")  # after 9 of 17: half, then half of that
    assert found[1] is None
    assert next(asked, "spent") == "spent"


def test_blank_lines_are_no_steps_and_stay_where_they_are() -> None:
    prefixes = []

    def continue_from(handovers: list[Handover]) -> list[None]:
        prefixes.append(handovers[0].prefix)
        return [None]

    least_help([problem(0)], ["\na\n\n  \nb\n\nc\n"], continue_from)
    least_help([problem(0)], ["\na\n\nb\n"], continue_from)
    assert prefixes == ["a\n\n  \nb\n", "a\n"]


def test_the_first_steps_leave_something_to_continue_with() -> None:
    assert first_steps("a\nb\nc\nd", 0.5) == "a\nb\n"
    assert first_steps("a\nb", 0.1) == "a\n"
    assert first_steps("a", 0.5) is None
