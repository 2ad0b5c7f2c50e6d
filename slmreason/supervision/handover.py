"""Hand-overs: the first steps of a worked solution, then the student's own continuation (arXiv 2506.17211).

`least_help` finds how few steps are enough; a `Search` is that of one problem. They know neither a student nor a
teacher: whoever uses them says what is tried behind a prefix, and what of that counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from slmreason.records import Problem
from slmreason.rollout.engine import Completion, Progress, PromptLimit, RolloutEngine, Sampling, prompt_limit
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import map_over_processes
from slmreason.student import Student

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handover:
    """What the student is to continue."""

    problem: Problem
    prefix: str
    """The steps that are handed over, with the line break that ends them."""


def first_steps(solution: str, share: float) -> str | None:
    """The first lines of a solution, at least one; None where nothing would be left to continue with.

    Args:
        share: of its lines.
    """
    lines = solution.strip().splitlines()
    kept = max(1, int(len(lines) * share))
    return "\n".join(lines[:kept]) + "\n" if kept < len(lines) else None


# -- how much help is enough ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Help(Generic[T]):
    """The least help that was enough for a problem."""

    steps: int
    """Of the solution, handed over: its first lines that are not blank."""
    share: float
    """The same as a share of the solution's steps."""
    outcome: T
    """What came of it."""


Try = Callable[[list[Handover]], Sequence[T | None]]
"""Tries the hand-overs of a round; of each what came of it, or None where that was not enough."""


def least_help(
    problems: Sequence[Problem],
    solutions: Sequence[str],
    continue_from: Try[T],
    may_go_on: Callable[[], bool] = lambda: True,
) -> list[Help[T] | None]:
    """How few first steps of each problem's solution are enough, by bisection, all problems side by side.

    It is taken that where some steps are enough, more are too. A problem whose solution has `n` steps is decided after
    `ceil(log2(n))` rounds, and leaves; a round is one call of `continue_from` with all that are still open.

    Args:
        solutions: of the problems, a step a line.
        may_go_on: asked before each round; where it says no, the search ends with what has been found.

    Returns:
        Of each problem the least help that was seen to be enough; None where none was, or nothing could be tried.
    """
    searches = [Search[T](problem, solution) for problem, solution in zip(problems, solutions, strict=True)]
    while (still_open := [search for search in searches if search.is_open]) and may_go_on():
        one_round(still_open, continue_from)
    return [search.found for search in searches]


def one_round(searches: Sequence[Search[T]], continue_from: Try[T]) -> None:
    """Tries the next number of steps of each search, all in one call. They must be open."""
    if not searches:
        return
    outcomes = continue_from([search.handover for search in searches])
    for search, outcome in zip(searches, outcomes, strict=True):
        search.take(outcome)


class Search(Generic[T]):
    """The bisection of one problem: the answer is from `low` to `high`, where `high` stands for none before a hit."""

    def __init__(self, problem: Problem, solution: str, leave: int = 1, most_first: bool = False) -> None:
        """
        Args:
            solution: a step a line.
            leave: steps that are never handed over.
            most_first: before it begins, the most steps are tried. Where they are not enough it goes on all the same,
                without them: a text that is mostly another's may confuse a student more than half of it helps.
        """
        self.problem, self.tries_most = problem, most_first
        self.lines = solution.strip().splitlines()
        self.ends = [number for number, line in enumerate(self.lines, 1) if line.strip()]
        self.low, self.high = 1, max(1, len(self.ends) - leave + 1)
        self.found: Help[T] | None = None

    @property
    def is_open(self) -> bool:
        return self.low < self.high

    @property
    def steps(self) -> int:
        """That are tried next."""
        if self.tries_most:
            return self.high - 1
        return (self.low + self.high) // 2

    @property
    def handover(self) -> Handover:
        kept = self.lines[: self.ends[self.steps - 1]]
        return Handover(self.problem, "\n".join(kept) + "\n")

    def take(self, outcome: T | None) -> None:
        """Notes what came of `handover`: None where it was not enough."""
        steps = self.steps
        if outcome is not None:
            self.found = Help(steps, steps / len(self.ends), outcome)
        if outcome is not None or self.tries_most:
            self.high = steps
        else:
            self.low = steps + 1
        self.tries_most = False


# -- continuing -----------------------------------------------------------------------------------------------------

Draw = Callable[[list[tuple[int, ...]]], Sequence[Sequence[Completion]]]
"""Samples completions of prompts: of each any number, in the order of the prompts."""


def hand_over(
    handovers: Sequence[Handover],
    student: Student,
    engine: RolloutEngine,
    sampling: Sampling,
    watch: Watch | None = None,
) -> list[str | None]:
    """Steps and continuation of each hand-over as one text: all are continued in one batched generate.

    Returns:
        None where the steps are too long to be continued, or the continuation ran into the token limit.
    """
    if not handovers:
        return []
    engine.sync(student)
    progress = None if watch is None else watch.advance

    def draw(prompts: list[tuple[int, ...]]) -> list[list[Completion]]:
        return sampled(prompts, student, engine, sampling, samples=1, progress=progress)

    longest = prompt_limit(student, engine, sampling.max_new_tokens, f"{sampling.max_new_tokens} new tokens")
    continued = continuations(handovers, student, draw, longest)
    if too_long := continued.count(None):
        log.warning("bridge: %d of %d hand-overs are not tried, the teacher's steps are too long: %s; lower "
                    "bridge.handover_share or bridge.max_trace_tokens", too_long, len(handovers),
                    longest.why)  # fmt: skip
    return [texts[0] if texts else None for texts in continued]


def continuations(
    handovers: Sequence[Handover], student: Student, draw: Draw, longest: PromptLimit
) -> list[list[str] | None]:
    """Steps and continuation of each hand-over as one text, as often as it is drawn.

    Args:
        draw: called once, with the prompts that are not longer than `longest`.

    Returns:
        Of each the texts that ended before the token limit; None where the steps are too long to be continued.
    """
    # The student's own tokens for prefix and continuation are joined as text, then encoded once as a target.
    prompts = [student.encode_problem(h.problem) + student.chat.text(h.prefix) for h in handovers]
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= longest.tokens]
    texts: list[list[str] | None] = [None for _ in handovers]
    for index, group in zip(fitting, draw([prompts[index] for index in fitting]), strict=True):
        ended = [completion for completion in group if not completion.truncated]
        texts[index] = [handovers[index].prefix + student.decode(completion.token_ids) for completion in ended]
    return texts


def sampled(
    prompts: Sequence[tuple[int, ...]],
    student: Student,
    engine: RolloutEngine,
    sampling: Sampling,
    samples: int,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """`samples` completions of each prompt in one batched generate, shared out over the processes and counted.

    The engine must have the student's present weights.
    """

    def sample(share: list[tuple[int, ...]]) -> list[list[Completion]]:
        return engine.generate(student, share, samples, sampling, progress)

    completions = map_over_processes(sample, prompts)
    student.tokens.sampled += sum(len(completion.token_ids) for group in completions for completion in group)
    return completions
