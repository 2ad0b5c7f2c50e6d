"""Arms of a comparison in numbers: what each reached over its seeds, and how far the first is ahead of the others."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slmreason.evaluate.bootstrap import Estimate, estimate, resampled, shared_seeds
from slmreason.records import TOKEN_KINDS
from slmreason.run.files import read_lines, write_text
from slmreason.run.folder import RunFolder

Verdicts = Mapping[str, Mapping[str, bool]]
"""Benchmark -> problem id -> right or wrong."""


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    arm: str
    seed: int
    correct: Verdicts
    """At the end."""
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
    correct = read_verdicts(files.answers(scored[-1]["stage"]))
    return Outcome(arm, seed, correct, stages[-1]["tokens"], sum(stage["seconds"] for stage in stages))


def read_verdicts(path: Path) -> Verdicts:
    """What a file of answers says of each problem.

    Raises:
        ValueError: it cannot be read.
    """
    correct: dict[str, dict[str, bool]] = {}
    for row in read_lines(path):
        correct.setdefault(row["benchmark"], {})[row["problem_id"]] = row["correct"]
    return correct


def summarise(outcomes: Sequence[Outcome], arms: Sequence[str], rng_seed: int = 0) -> list[ArmResult]:
    """Means and 95 % bootstrap intervals of each arm, in the order of `arms`; the first is compared with the others.

    Arms are compared over the seeds that all of them have. An arm whose runs are all the same (the base) counts for
    each seed.

    Raises:
        ValueError: there is no such seed, or the runs were not asked the same problems.
    """
    runs = {(outcome.arm, outcome.seed): outcome for outcome in outcomes}
    present, seeds = shared_seeds(runs, arms)
    problems = asked(run.correct for run in (runs[present[0], seeds[0]], *runs.values()))
    draws = resampled({
        arm: {
            name: np.array([[runs[arm, seed].correct[name][i] for i in ids] for seed in seeds], dtype=float)
            for name, ids in problems.items()
        }
        for arm in present
    }, rng_seed)  # fmt: skip
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
                mean=estimate(centre, means[arm]),
                benchmarks={
                    name: estimate(float(np.mean([run.accuracy[name] for run in mine])), draws[arm][name])
                    for name in problems
                },
                ahead=None if arm == present[0] else estimate(first - centre, means[present[0]] - means[arm]),
                tokens=float(np.mean([sum(run.tokens.values()) for run in mine])),
                seconds=float(np.mean([run.seconds for run in mine])),
            )
        )
    return results


def asked(verdicts: Iterable[Verdicts]) -> dict[str, list[str]]:
    """Benchmark -> ids of its problems, which must be the same in all.

    Raises:
        ValueError: they are not.
    """
    first, *others = ({name: list(each) for name, each in one.items()} for one in verdicts)
    if any(other != first for other in others):
        raise ValueError("the runs were not asked the same benchmark problems")
    return first


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
