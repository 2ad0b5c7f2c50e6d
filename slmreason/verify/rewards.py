"""What a completion earns. Correctness is the verifier's; a small format term is optional."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from slmreason.records import Problem, Reject
from slmreason.verify.answers import Claim, final_answer, last_boxed, rule
from slmreason.verify.choices import chosen
from slmreason.verify.notation import is_words, tidy
from slmreason.verify.process_pool import DEFAULT, Limits

MAX_SHOWN_CHARS = 200


@dataclass(frozen=True)
class Verdict:
    """A graded completion."""

    reward: float
    correct: bool
    """What the ledger, the strata and the benchmarks count; the format term never enters it."""
    scores: dict[str, float | None] = field(default_factory=dict, hash=False)
    """Of a reward with several terms, what each gave, by name; None where it does not apply."""
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    """What its functions noted of this completion."""


@dataclass(frozen=True)
class Answer:
    """A completion of a problem, as text and as the tokens that were sampled."""

    problem: Problem
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """Where a fit stands: what of a `transformers.TrainerState` functions written for TRL read."""

    global_step: int = 0
    """Optimizer steps so far."""
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 0


class RewardFn(ABC):
    """Grades completions. A subclass needs `__call__`; one that grades many faster together overrides `grade` too."""

    wants_finished_answer: ClassVar[bool] = False
    """Whether a completion that ran into the token limit is wrong unless it has a box, an `<answer>` tag or a marker.
    For a reward that reads answers in another form, its own verdict stands."""

    def __init_subclass__(cls) -> None:
        if "__call__" in vars(cls) and "grade" not in vars(cls):
            cls.grade = RewardFn.grade  # type: ignore[method-assign] # not that of a parent, which knows nothing of it

    @abstractmethod
    def __call__(self, problem: Problem, text: str) -> Verdict:
        """The verdict on `text` as an answer to `problem`."""

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """The verdict on each completion, in their order."""
        return [self(problem, text) for problem, text in pairs]

    def reward_for(self, problem: Problem) -> RewardFn:
        """Who grades answers to a problem: this reward, unless it hands them on to others."""
        return self

    def drain_rejects(self) -> list[Reject]:
        """The completions since the last call that were judged wrong because grading them met a limit."""
        return []

    # -- for a reward of several terms, `RewardTerms`; any other is its only one -----------------------------------

    @property
    def verifier(self) -> RewardFn:
        """Who says what is correct."""
        return self

    def wants_column(self, column: str) -> bool:
        """Whether problems have to keep a column of their rows for it."""
        return False

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of its terms, under which what each gave is logged as `grpo/reward/NAME`."""
        return ()

    @property
    def may_log_more(self) -> bool:
        """Whether its functions may log numbers under names that nobody knows beforehand."""
        return False

    def at_step(self, step: Step) -> None:  # noqa: B027 - most do not ask
        """Is told where the fit stands before completions are graded."""

    def with_terms(self, answers: Sequence[Answer], verdicts: Sequence[Verdict], group_size: int) -> list[Verdict]:
        """The verifier's verdicts with the reward that GRPO is trained on.

        Args:
            answers: completions, group after group.
            verdicts: of the verifier, in their order.
        """
        return list(verdicts)

    def try_terms(self, problems: Iterable[Problem]) -> None:  # noqa: B027 - most have nothing else
        """Tries what is there besides the verifier."""


class AnswerReward(RewardFn):
    """1 for a right final answer, plus `format_weight` for a boxed one, right or wrong.

    A completion that was cut off at the token limit before it gave its answer is wrong: it may end in the gold number
    by accident. What takes algebra is compared in worker processes (see `process_pool`), started when the first such
    answer comes; rewards with the same limits share them.
    """

    wants_finished_answer = True

    def __init__(
        self,
        format_weight: float = 0.0,
        workers: int | None = DEFAULT.workers,
        timeout_s: float = DEFAULT.timeout_s,
        memory_mb: int = DEFAULT.memory_mb,
        budget_s: float = DEFAULT.budget_s,
    ) -> None:
        r"""
        Args:
            format_weight: Added to the reward when the completion has a `\boxed{}` answer.
            workers: Processes that compare answers; null takes one for each core, at most four.
            timeout_s: Seconds of processor time a comparison may take; then its process is killed and the answer is
                wrong.
            memory_mb: MiB of address space a process may have; a comparison that needs more makes the answer wrong.
            budget_s: Seconds that all completions graded together may lose to comparisons without a verdict; as they
                are used up, comparisons are given less than `timeout_s`.

        Raises:
            ValueError: a limit is not positive.
        """
        self.format_weight = format_weight
        self.limits = Limits(workers, timeout_s, memory_mb, budget_s)
        self._rejects: list[Reject] = []

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return AnswerReward.grade(self, [(problem, text)])[0]

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        rulings = rule([_claim(problem, text) for problem, text in pairs], self.limits)
        for (problem, text), ruling in zip(pairs, rulings, strict=True):
            if ruling.limit:
                answer = (read_answer(problem, text) or "")[:MAX_SHOWN_CHARS]
                self._rejects.append(Reject(problem.id, "verifier", ruling.limit, {"answer": answer}))
        return [
            Verdict(float(ruling.correct) + self._bonus(text), ruling.correct)
            for (_, text), ruling in zip(pairs, rulings, strict=True)
        ]

    def drain_rejects(self) -> list[Reject]:
        rejects, self._rejects = self._rejects, []
        return rejects

    def _bonus(self, text: str) -> float:
        return self.format_weight if self.format_weight and last_boxed(text) is not None else 0.0


def read_answer(problem: Problem, text: str, truncated: bool = False) -> str | None:
    """What a completion answers to a problem: an option letter, words or an expression; None when it has no answer.

    Args:
        truncated: the token limit cut the text off, so only a finished answer counts.
    """
    if problem.choices is not None:
        return chosen(text, problem.choices, truncated=truncated)
    return final_answer(text, truncated, words=is_words(tidy(problem.answer)))


def _claim(problem: Problem, text: str) -> Claim:
    return Claim(
        text,
        problem.answer,
        is_choice=problem.choices is not None,
        tolerance=problem.tolerance,
        relative_tolerance=problem.relative_tolerance,
        options=problem.choices or (),
    )
