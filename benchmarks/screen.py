"""What one forward pass over the traces tells of a student's rho, beside rollouts.

    python -m benchmarks.screen --student FOLDER --data openai/gsm8k=train.jsonl.gz --problems 128 --dtype bfloat16

Each problem is sampled `--attempts` times and its trace, of `--tokens` at most, is scored once.
`rank_correlation` is Spearman's, of the rates with what the regression on the scores predicts for problems that it has
not seen (five folds), with a bootstrap interval over problems; beside it that of each score alone.

Then bands: a problem has `rollouts` of its own, and a
prior, either the pool's (`without`) or that of its trace (`with`), both made from the other problems alone. The band is
right where it is that of the problem's remaining rollouts, which are noisy themselves: shares are comparable, and below
what they would be with rho known. `gain_nats` is by how much the remaining rollouts are likelier by the trace's prior.
`certain` are problems whose band has the probability of `curriculum.probe.certain`: they would not be sampled further.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.bridge import student_of, with_solution
from benchmarks.common import quiet, save
from benchmarks.probe import add_arguments, probed
from slmreason.curriculum.predictor import scorable
from slmreason.curriculum.settings import CERTAIN
from slmreason.data.posterior import Array, Counts, Posterior, fitted_prior
from slmreason.data.predictor import FOLDS, best_strength, features, held_out_rates, likelihoods, predict, spearman
from slmreason.data.sources import load_problems
from slmreason.data.strata import Bands, likeliest
from slmreason.records import Problem, TraceScores
from slmreason.student import Student
from slmreason.supervision.learnability import trace_scores

SPLITS = 50
"""Ways to part a problem's rollouts into its own and those that tell whether its band is right."""
RESAMPLES = 2000
"""Of the bootstrap."""
SCORES = ("mean_nll", "log_rank_surprisal_ratio", "answer_nll", "log_num_tokens")
Right = NDArray[np.bool_]
"""[problems, attempts]"""


def scored(student: Student, pool: Sequence[Problem], traces: dict[str, str]) -> tuple[list[TraceScores], int, float]:
    """(scores of each trace, tokens, seconds)."""
    began = time.perf_counter()
    found = trace_scores(pool, [traces[problem.id] for problem in pool], student)
    return found, sum(each.cost for each in found), time.perf_counter() - began


def counted(right: Array, attempts: int) -> Counts:
    return Counts(right, attempts - right, np.full(len(right), float(attempts)))


def interval(statistic: Callable[[NDArray[np.int64]], float], size: int, seed: int) -> list[float]:
    """The middle 95 % of a statistic over problems that are drawn again with replacement.

    Args:
        statistic: places of the drawn problems -> number.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, size, size)) for _ in range(RESAMPLES)]
    return [round(float(value), 4) for value in np.quantile(values, (0.025, 0.975))]


def priors(x: Array, counts: Counts) -> dict[str, Posterior]:
    """Of each problem, made from the other folds alone."""
    held_out, fold = held_out_rates(x, counts), np.arange(len(x)) % FOLDS
    found = {name: Posterior(np.empty(len(x)), np.empty(len(x))) for name in ("without", "with")}
    for number in range(FOLDS):
        here = fold == number
        others = Counts(counts.right[~here], counts.wrong[~here], counts.squares[~here])
        pool = fitted_prior(others)
        found["without"].a[here], found["without"].b[here] = pool.a, pool.b
        strength, _ = best_strength(held_out[~here], others)
        found["with"].a[here], found["with"].b[here] = strength * held_out[here], strength * (1 - held_out[here])
    return found


def bands_row(right: Right, own: int, prior: dict[str, Posterior], seed: int) -> dict[str, Any]:
    """Bands by so many rollouts and a prior, against those of the remaining rollouts."""
    bands, rng = Bands(evidence_model="posterior"), np.random.default_rng(seed)
    size, attempts = right.shape
    is_right = {name: np.zeros(size) for name in prior}
    nats, certain, certain_right = ({name: np.zeros(size) for name in prior} for _ in range(3))
    for _ in range(SPLITS):
        shuffled = rng.permuted(right, axis=1)
        seen, rest = shuffled[:, :own].sum(axis=1), shuffled[:, own:].sum(axis=1)
        true = [bands.of(rate) for rate in (rest / (attempts - own)).tolist()]
        for name, each in prior.items():
            posterior = Posterior(each.a + seen, each.b + own - seen)
            found, certainty = likeliest(posterior, bands)
            hits = np.array([band == other for band, other in zip(found, true, strict=True)])
            sure = np.array(certainty) >= CERTAIN
            is_right[name] += hits / SPLITS
            certain[name] += sure / SPLITS
            certain_right[name] += (sure & hits) / SPLITS
            nats[name] += likelihoods(counted(rest.astype(float), attempts - own), posterior.a, posterior.b) / SPLITS
    gain = is_right["with"] - is_right["without"]
    return {
        "rollouts": own,
        **{name: round(float(found.mean()), 4) for name, found in is_right.items()},
        "difference": round(float(gain.mean()), 4),
        "difference_95": interval(lambda drawn: gain[drawn].mean(), size, seed),
        "gain_nats": round(float((nats["with"] - nats["without"]).mean()), 4),
        "gain_nats_95": interval(lambda drawn: (nats["with"] - nats["without"])[drawn].mean(), size, seed),
        "certain": {name: round(float(found.mean()), 4) for name, found in certain.items()},
        "certain_and_right": {name: round(float(found.mean()), 4) for name, found in certain_right.items()},
    }


def analyse(scores: Sequence[TraceScores], right: Right, seed: int = 0) -> dict[str, Any]:
    """What the scores tell of these rollouts.

    Args:
        scores: of the trace of each problem.
    """
    x, counts = features(scores), counted(right.sum(axis=1).astype(float), right.shape[1])
    rates, held_out, size = counts.right / counts.total, held_out_rates(x, counts), len(x)
    predicted = predict(x, counts)
    prior = priors(x, counts)
    half = right.shape[1] // 2
    return {
        "rho": round(float(rates.mean()), 4),
        "share_of_bands": {
            band: round(float(np.mean([Bands().of(rate) == band for rate in rates.tolist()])), 4)
            for band in ("simple", "medium", "hard")
        },
        "predictor": {**predicted.metrics(), "off": predicted.off},
        "rank_correlation": round(spearman(held_out, rates), 4),
        "rank_correlation_95": interval(lambda drawn: spearman(held_out[drawn], rates[drawn]), size, seed),
        "of_each_score": {name: round(spearman(x[:, column], rates), 4) for column, name in enumerate(SCORES)},
        "bands": [bands_row(right, own, prior, seed) for own in (0, 1, 2, 4, 8) if own <= half],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--student", default="embedded:qwen2", help="a folder in Hugging Face form, or a name")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="embedded:chain/train?count=128")
    parser.add_argument("--problems", type=int, default=128, help="the first so many with a trace")
    add_arguments(parser, attempts=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.attempts < 2:
        parser.error("--attempts must be at least 2: some rollouts tell whether the band by the others is right")
    quiet()
    student = student_of(options.student, options.dtype)
    student.to(options.device)
    everything = [with_solution(problem) for problem in load_problems(options.data).problems]
    traces = scorable(everything, {}, student, options.tokens)
    pool = [problem for problem in everything if problem.id in traces][: options.problems]
    scores, read, reading = scored(student, pool, traces)
    print(f"the traces of {len(pool)} problems scored, {read} tokens in {reading:.1f} s", flush=True)
    evidence = probed(student, pool, options)
    right = np.array([[number < each.successes for number in range(each.attempts)] for each in evidence])
    row = {
        "student": Path(options.student).name,
        "dtype": options.dtype,
        "data": options.data.rpartition("/")[2],
        "problems": len(pool),
        "attempts": options.attempts,
        "forward": {"tokens": read, "seconds": round(reading, 1)},
        "probe": {"tokens": sum(each.tokens for each in evidence)},
        **analyse(scores, right, options.seed),
        "each": [
            {"id": s.problem_id, "right": int(count), "mean_nll": round(s.mean_nll, 4),
             "rank_surprisal_ratio": round(s.rank_surprisal_ratio, 4), "answer_nll": round(s.answer_nll, 4),
             "num_tokens": s.num_tokens}
            for s, count in zip(scores, right.sum(axis=1).tolist(), strict=True)
        ],
    }  # fmt: skip
    save(options.out, [row])


if __name__ == "__main__":
    main()
