"""Arms of a comparison in numbers: what each reached over its seeds, and how far the first is ahead of the others.

Runs differ by seed, and a benchmark is a sample of problems: the intervals are of both. A bootstrap draws seeds and
problems anew, the same ones for every arm, so that a difference is paired in both.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slmreason.records import TOKEN_KINDS
from slmreason.run.files import read_lines, write_text
from slmreason.run.folder import RunFolder

DRAWS = 10_000


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    arm: str
    seed: int
    correct: Mapping[str, Mapping[str, bool]]
    """Verdicts at the end: benchmark -> problem id -> right or wrong."""
    tokens: Mapping[str, int]
    """Sampled, trained, written."""
    seconds: float

    @property
    def accuracy(self) -> dict[str, float]:
        return {name: sum(verdicts.values()) / len(verdicts) for name, verdicts in self.correct.items()}

    @property
    def mean(self) -> float:
        """Over the benchmarks, each counting the same."""
        return float(np.mean(list(self.accuracy.values())))


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def signed(self) -> str:
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class ArmResult:
    """One arm over the seeds."""

    arm: str
    seeds: tuple[int, ...]
    mean: Estimate
    """Over the benchmarks."""
    benchmarks: dict[str, Estimate]
    ahead: Estimate | None
    """By how much the first arm is better than this one; None for the first itself."""
    tokens: float
    """Mean over the seeds."""
    seconds: float


def read_outcome(run_dir: Path, arm: str, seed: int) -> Outcome | None:
    """What a run came to; None when it has not come to its end.

    Raises:
        ValueError: its files cannot be read.
    """
    files = RunFolder(run_dir)
    summary = files.summary
    if not summary.exists() or not files.student.is_dir():
        return None
    stages = json.loads(summary.read_text())
    scored = [stage for stage in stages if stage["scores"]]
    if not scored:
        raise ValueError(f"{summary}: no benchmark was run")
    correct: dict[str, dict[str, bool]] = {}
    for row in read_lines(files.answers(scored[-1]["stage"])):
        correct.setdefault(row["benchmark"], {})[row["problem_id"]] = row["correct"]
    return Outcome(arm, seed, correct, stages[-1]["tokens"], sum(stage["seconds"] for stage in stages))


def summarise(outcomes: Sequence[Outcome], arms: Sequence[str], rng_seed: int = 0) -> list[ArmResult]:
    """Means and 95 % bootstrap intervals of each arm, in the order of `arms`; the first is compared with the others.

    Arms are compared over the seeds that all of them have. An arm whose runs are all the same (the base) counts for
    each seed.

    Raises:
        ValueError: there is no such seed, or the runs were not asked the same problems.
    """
    runs = {(outcome.arm, outcome.seed): outcome for outcome in outcomes}
    present = [arm for arm in arms if any(name == arm for name, _ in runs)]
    seeds = (
        sorted(set.intersection(*({seed for name, seed in runs if name == arm} for arm in present))) if present else []
    )
    if not seeds:
        raise ValueError("no seed has come to its end in every arm")
    problems = {name: list(verdicts) for name, verdicts in runs[present[0], seeds[0]].correct.items()}
    if any({b: list(v) for b, v in run.correct.items()} != problems for run in runs.values()):
        raise ValueError("the runs were not asked the same benchmark problems")
    rng = np.random.default_rng(rng_seed)
    seed_weights = rng.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), DRAWS) / len(seeds)
    draws: dict[str, dict[str, NDArray[np.float64]]] = {arm: {} for arm in present}
    for name, ids in problems.items():
        problem_weights = rng.multinomial(len(ids), [1 / len(ids)] * len(ids), DRAWS) / len(ids)
        for arm in present:
            right = np.array([[runs[arm, seed].correct[name][i] for i in ids] for seed in seeds], dtype=float)
            draws[arm][name] = np.einsum("ds,sp,dp->d", seed_weights, right, problem_weights, optimize=True)
    means = {arm: np.mean(list(draws[arm].values()), axis=0) for arm in present}
    results = []
    for arm in present:
        mine = [runs[arm, seed] for seed in seeds]
        centre = float(np.mean([run.mean for run in mine]))
        first = float(np.mean([runs[present[0], seed].mean for seed in seeds]))
        results.append(
            ArmResult(
                arm=arm,
                seeds=tuple(seeds),
                mean=_estimate(centre, means[arm]),
                benchmarks={
                    name: _estimate(float(np.mean([run.accuracy[name] for run in mine])), draws[arm][name])
                    for name in problems
                },
                ahead=None if arm == present[0] else _estimate(first - centre, means[present[0]] - means[arm]),
                tokens=float(np.mean([sum(run.tokens.values()) for run in mine])),
                seconds=float(np.mean([run.seconds for run in mine])),
            )
        )
    return results


def _estimate(centre: float, draws: NDArray[np.float64]) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(centre, float(low), float(high))


# -- how it is kept -------------------------------------------------------------------------------------------------


def token_kinds(outcomes: Sequence[Outcome]) -> list[str]:
    """What tokens of these runs are counted as: columns of a table."""
    return [kind for kind in TOKEN_KINDS if any(kind in outcome.tokens for outcome in outcomes)]


def save_comparison(folder: Path, outcomes: Sequence[Outcome], results: Sequence[ArmResult]) -> None:
    """`runs.csv` with a line a run, `arms.csv` with a line an arm."""
    names, kinds = list(results[0].benchmarks), token_kinds(outcomes)
    runs = [
        [o.arm, o.seed, *(f"{o.accuracy[name]:.4f}" for name in names), f"{o.mean:.4f}",
         *(o.tokens.get(kind, 0) for kind in kinds), f"{o.seconds:.0f}"]
        for o in outcomes
    ]  # fmt: skip
    write_csv(folder / "runs.csv", ["arm", "seed", *names, "mean", *kinds, "seconds"], runs)
    arms = []
    for result in results:
        columns = [result.mean, *result.benchmarks.values(), result.ahead]
        numbers = [f"{x:.4f}" if e else "" for e in columns for x in ((e.mean, e.low, e.high) if e else (0, 0, 0))]
        arms.append([result.arm, len(result.seeds), *numbers, f"{result.tokens:.0f}", f"{result.seconds:.0f}"])
    heads = [f"{name}{end}" for name in ("mean", *names, "ahead") for end in ("", "_low", "_high")]
    write_csv(folder / "arms.csv", ["arm", "seeds", *heads, "tokens", "seconds"], arms)


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(path, text.getvalue())
