"""Accuracy against tokens: the curve of each arm, how far the first lies above the others, and from which budget on.

A run measures the benchmarks when its tokens pass a budget, and keeps every verdict. So one run gives the accuracy at
several budgets, and seeds and problems can be drawn anew for the whole curve: its points belong together.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmreason.evaluate.bootstrap import Estimate, Numbers, estimate, resampled, shared_seeds
from slmreason.evaluate.compare import Outcome, Verdicts, asked, read_verdicts
from slmreason.run.files import read_lines, write_text
from slmreason.run.folder import RunFolder

log = logging.getLogger(__name__)
MEAN = "mean"
"""What the mean over the benchmarks is called."""


@dataclass(frozen=True)
class Curve:
    """One run's verdicts at each budget, the base at 0 first."""

    arm: str
    seed: int
    correct: Mapping[int, Verdicts]
    """Budget in tokens -> verdicts; those at the end stand for every budget that the run did not reach."""
    tokens: Mapping[int, int]
    """Budget -> what the run had taken where it was measured."""


@dataclass(frozen=True)
class Lead:
    """How far the first arm's curve lies above another one."""

    points: tuple[Estimate, ...]
    """At each budget."""
    area: Estimate
    """Mean height between the curves."""
    since: int | None
    """The smallest budget from which on the first arm is surely ahead; None for none."""


@dataclass(frozen=True)
class ArmCurve:
    """One arm over the seeds, at each budget."""

    arm: str
    tokens: tuple[float, ...]
    """What its runs had taken where they were measured, as a mean over the seeds."""
    accuracy: tuple[Estimate, ...]
    area: Estimate
    """Mean height of the curve."""
    lead: Lead | None
    """Of the first arm on this one; None for the first itself."""


@dataclass(frozen=True)
class Curves:
    """The curves of all arms, on one benchmark or in the mean over all of them."""

    of: str
    budgets: tuple[int, ...]
    """Tokens, 0 first."""
    seeds: tuple[int, ...]
    arms: tuple[ArmCurve, ...]


def area(budgets: Sequence[float], heights: Numbers) -> Numbers:
    """The area under curves by the trapezoidal rule, over the width: their mean height.

    Args:
        budgets: ascending, at least two.
        heights: (..., budgets).

    Returns:
        Of shape (...).
    """
    widths = np.diff(np.asarray(budgets, dtype=float))
    middles = (heights[..., 1:] + heights[..., :-1]) / 2
    means: Numbers = middles @ widths / widths.sum()
    return means


def ahead_from(budgets: Sequence[int], ahead: Sequence[Estimate]) -> int | None:
    """The smallest budget from which on the interval of the difference stays above 0; None where there is none."""
    first = None
    for budget, difference in zip(reversed(budgets), reversed(ahead), strict=True):
        if difference.low <= 0:
            break
        first = budget
    return first


def compare_curves(curves: Sequence[Curve], arms: Sequence[str], rng_seed: int = 0) -> list[Curves]:
    """The curves of the arms with 95 % bootstrap intervals: the mean over the benchmarks, then each of them.

    They are compared over the seeds that all arms have. With the same `rng_seed`, the last point has the interval that
    `summarise` gives.

    Raises:
        ValueError: there is no such seed, or the runs were not asked the same problems, or at the same budgets.
    """
    runs = {(curve.arm, curve.seed): curve for curve in curves}
    present, seeds = shared_seeds(runs, arms)
    budgets = tuple(runs[present[0], seeds[0]].correct)
    if any(tuple(run.correct) != budgets for run in runs.values()):
        raise ValueError("the runs were not measured at the same budgets")
    first = runs[present[0], seeds[0]].correct[budgets[0]]
    problems = asked([first, *(verdicts for run in runs.values() for verdicts in run.correct.values())])
    right = {
        arm: {
            name: np.array(
                [[[runs[arm, seed].correct[b][name][i] for i in ids] for b in budgets] for seed in seeds], dtype=float
            )
            for name, ids in problems.items()
        }
        for arm in present
    }  # arm -> benchmark -> (seeds, budgets, problems)
    means = {arm: {name: each.mean(axis=(0, 2)) for name, each in by_name.items()} for arm, by_name in right.items()}
    draws = resampled(right, rng_seed)
    tokens = {arm: [float(np.mean([runs[arm, s].tokens[b] for s in seeds])) for b in budgets] for arm in present}
    names = list(problems)
    found = []
    for of, chosen in [(MEAN, names), *((name, [name]) for name in names)]:
        middle = {arm: np.mean([means[arm][name] for name in chosen], axis=0) for arm in present}  # (budgets,)
        drawn = {arm: np.mean([draws[arm][name] for name in chosen], axis=0) for arm in present}  # (draws, budgets)
        arms_of = tuple(_arm(arm, present[0], budgets, tokens[arm], middle, drawn) for arm in present)
        found.append(Curves(of, budgets, tuple(seeds), arms_of))
    return found


def _arm(
    arm: str,
    first: str,
    budgets: tuple[int, ...],
    tokens: Sequence[float],
    middle: Mapping[str, Numbers],
    drawn: Mapping[str, Numbers],
) -> ArmCurve:
    accuracy, its_area = _along(budgets, middle[arm], drawn[arm])
    if arm == first:
        return ArmCurve(arm, tuple(tokens), accuracy, its_area, lead=None)
    ahead, between = _along(budgets, middle[first] - middle[arm], drawn[first] - drawn[arm])
    return ArmCurve(arm, tuple(tokens), accuracy, its_area, Lead(ahead, between, ahead_from(budgets, ahead)))


def _along(budgets: Sequence[int], middle: Numbers, drawn: Numbers) -> tuple[tuple[Estimate, ...], Estimate]:
    """The estimate at each budget, and that of the mean height."""
    points = tuple(estimate(middle[place], drawn[:, place]) for place in range(len(budgets)))
    return points, estimate(float(area(budgets, middle)), area(budgets, drawn))


# -- how it is kept -------------------------------------------------------------------------------------------------


def read_curve(run_dir: Path, end: Outcome, budgets: Sequence[int]) -> Curve:
    """The curve of a run that has come to its end.

    Args:
        end: what the run came to.
        budgets: tokens, ascending, without the base.

    Raises:
        ValueError: its files cannot be read, or it passed a budget without being measured there.
    """
    files, spent = RunFolder(run_dir), sum(end.tokens.values())
    points = {row["budget"]: row for row in read_lines(files.curve)}
    correct: dict[int, Verdicts] = {}
    tokens: dict[int, int] = {}
    for budget in (0, *budgets):
        if (point := points.get(budget)) is not None:
            correct[budget], tokens[budget] = read_verdicts(run_dir / point["answers"]), sum(point["tokens"].values())
        elif budget > spent:
            correct[budget], tokens[budget] = end.correct, spent
        else:
            raise ValueError(f"{files.curve}: the run took {spent} tokens and was not measured at {budget}")
    return Curve(end.arm, end.seed, correct, tokens)


def tell_early_ends(curves: Sequence[Curve]) -> None:
    """Says which arms ended before a budget: their curves go on as they ended."""
    for arm in dict.fromkeys(curve.arm for curve in curves):
        mine = [curve for curve in curves if curve.arm == arm]
        early = [curve for curve in mine if curve.tokens[max(curve.tokens)] < max(curve.tokens)]
        if early:
            least = min(curve.tokens[max(curve.tokens)] for curve in early)
            log.info("%s: %d of %d runs ended before the last budget (the first at %d tokens); their last accuracy "
                     "stands for the budgets beyond", arm, len(early), len(mine), least)  # fmt: skip


def save_curves(path: Path, curves: Sequence[Curves]) -> None:
    """Everything about the curves as JSON: accuracies, differences and areas in shares of 1."""
    first = curves[0]
    tree: dict[str, Any] = {
        "budgets": first.budgets,
        "seeds": first.seeds,
        "first": first.arms[0].arm,
        "curves": {each.of: [asdict(arm) for arm in each.arms] for each in curves},
    }
    write_text(path, json.dumps(tree, indent=1) + "\n")
