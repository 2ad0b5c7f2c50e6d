"""A reward of several terms: the verifier, who says what is correct, and plain functions, each with its weight.

Source: TRL 1.16, `GRPOTrainer`: the weighted sum without the terms that do not apply, and `normalize_then_sum` of GDPO
(arXiv 2601.05242).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from slmreason.records import Problem, Reject
from slmreason.verify.functions import Given, RewardFunction, call_all, storable
from slmreason.verify.rewards import Answer, RewardFn, Step, Verdict
from slmreason.verify.verdicts import graded, verdict_on

EPSILON = 1e-4
"""Added to the standard deviation of a term, as in TRL."""
Column = Sequence[float | None]
"""What a term gave each completion; None where it does not apply."""


@dataclass(frozen=True)
class WeightedFunction:
    """A function and what it counts for."""

    function: RewardFunction
    weight: float = 1.0


class RewardTerms(RewardFn):
    """The sum of a verifier's reward and of functions, each times its weight. What is correct says the verifier alone.

    Only GRPO is trained on the sum: probes, benchmarks and the checks of traces ask the verifier.
    """

    def __init__(
        self,
        verifier: RewardFn,
        functions: Sequence[WeightedFunction],
        verifier_weight: float = 1.0,
        normalize: bool = False,
        verifier_name: str | None = None,
    ) -> None:
        """
        Args:
            verifier: says what is correct; its own reward is a term too.
            functions: the other terms.
            verifier_weight: of the verifier's reward; 0 leaves it out of the sum.
            normalize: each term is brought to mean 0 and standard deviation 1 within a group before it is weighted.
            verifier_name: under which its reward is logged; its class's where this is None.

        Raises:
            ValueError: two terms have one name, or a weight is not finite.
        """
        self._verifier, self.functions, self.normalize = verifier, tuple(functions), normalize
        self.weights = (verifier_weight, *(each.weight for each in functions))
        self.names = (verifier_name or type(verifier).__name__, *(each.function.name for each in functions))
        self.step = Step()
        for name, weight in zip(self.names, self.weights, strict=True):
            if not math.isfinite(weight):
                raise ValueError(f"reward: {name}: weight must be finite, got {weight}")
            if self.names.count(name) > 1:
                raise ValueError(f"reward: two terms are named {name}; give one of them a name: of its own")

    @property
    def verifier(self) -> RewardFn:
        return self._verifier

    def with_verifier(self, verifier: RewardFn) -> RewardTerms:
        """The same terms with another in the verifier's place, logged under the same name."""
        return RewardTerms(verifier, self.functions, self.weights[0], self.normalize, self.names[0])

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return verdict_on(self.verifier, problem, text)

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return graded(self.verifier, pairs)

    def reward_for(self, problem: Problem) -> RewardFn:
        return self.verifier.reward_for(problem)

    def drain_rejects(self) -> list[Reject]:
        return self.verifier.drain_rejects()

    def wants_column(self, column: str) -> bool:
        return any(each.function.wants_column(column) for each in self.functions)

    @property
    def terms(self) -> tuple[str, ...]:
        return self.names

    @property
    def may_log_more(self) -> bool:
        return any(each.function.may_log_metrics for each in self.functions)

    def at_step(self, step: Step) -> None:
        self.step = step

    def with_terms(self, answers: Sequence[Answer], verdicts: Sequence[Verdict], group_size: int) -> list[Verdict]:
        given = call_all([each.function for each in self.functions], answers, self.step)
        columns: list[Column] = [[verdict.reward for verdict in verdicts], *(each.values for each in given)]
        sums = totals(columns, self.weights, group_size, self.normalize)
        metrics: dict[str, float | None] = {name: value for each in given for name, value in each.metrics.items()}
        return [
            replace(
                verdict,
                reward=total,
                scores={**metrics, **{name: column[at] for name, column in zip(self.names, columns, strict=True)}},
                extra=_logged(given, at),
            )
            for at, (verdict, total) in enumerate(zip(verdicts, sums, strict=True))
        ]

    def try_terms(self, problems: Iterable[Problem]) -> None:
        """Calls each function with two completions of a problem that has the columns it needs.

        Raises:
            RewardError: no problem has them, or the function fails or gives what is no number.
        """
        listed = list(problems)
        for function in (each.function for each in self.functions):
            problem = next((each for each in listed if not function.missing(each)), None)
            if problem is None:
                missing = sorted({name for each in listed for name in function.missing(each)})
                raise function.error(f"it needs the column {', '.join(missing)}, which no row of data.train has")
            texts = (f"The answer is \\boxed{{{problem.answer}}}.", "I do not know.")
            answers = [Answer(problem, text, tuple(range(len(text.split())))) for text in texts]
            call_all([function], answers, self.step)


def _logged(given: Sequence[Given], at: int) -> dict[str, Any]:
    return {name: storable(values[at]) for each in given for name, values in each.extra.items()}


def totals(columns: Sequence[Column], weights: Sequence[float], group_size: int, normalize: bool) -> list[float]:
    """The reward of each completion: the weighted sum of the terms that apply to it.

    A completion to which no term with a weight applies earns what the others of its group do on average, so that it has
    no advantage; TRL leaves it out.

    Args:
        columns: by term, the values of all completions, group after group.
        normalize: each term is brought to mean 0 and standard deviation 1 within its group first.
    """
    counted = [(column, weight) for column, weight in zip(columns, weights, strict=True) if weight]
    if normalize:
        counted = [(_normalized(column, group_size), weight) for column, weight in counted]
    rows = range(len(columns[0]))
    sums: list[float | None] = []
    for at in rows:
        parts = [weight * value for column, weight in counted if (value := column[at]) is not None]
        sums.append(sum(parts) if parts else None)
    result: list[float] = []
    for start in rows[::group_size]:
        group = sums[start : start + group_size]
        mean = _mean([total for total in group if total is not None])
        result += [mean if total is None else total for total in group]
    return result


def _normalized(column: Column, group_size: int) -> list[float | None]:
    result: list[float | None] = []
    for start in range(0, len(column), group_size):
        group = column[start : start + group_size]
        there = [value for value in group if value is not None]
        mean = _mean(there)
        spread = stdev(there) if len(there) > 1 else 0.0
        result += [None if value is None else (value - mean) / (spread + EPSILON) for value in group]
    return result


def _mean(values: Sequence[float]) -> float:
    """The mean; of equal values that very value, so that a group without differences stays one."""
    if not values:
        return 0.0
    return values[0] if len(set(values)) == 1 else fmean(values)
