"""How many verdicts a second: `AnswerReward().grade` against math-verify called in a loop.

    python -m benchmarks.verdicts --data model_solutions.jsonl.gz --out benchmarks/results/verdicts.json

The completions are those of GRPO: groups of eight for a problem, in which answers repeat. They come from the embedded
families, from recorded completions of real models (`--data`), and, as the case in which no short cut applies, from
fractions, surds and sets, all of which go to the worker processes. The peer is `verify(parse(gold), parse(text))` with
the default settings, in one process, as a reward function would call it.

The first time that completions are seen is reported (cold; the workers run already), and the next time (warm): an epoch
later a group gives many of the same answers. The two sides take turns, each turn with new completions; the figures are
medians. What math-verify itself is asked about takes as long as it takes: there the gain is the worker processes, and
that answers which repeat are compared once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from math_verify import parse, verify

from slmreason.data.recorded import read_recorded
from slmreason.embedded.families import FAMILIES, make_problems, rebuild, write_solution
from slmreason.records import Problem
from slmreason.verify import answers
from slmreason.verify.process_pool import shared_pool
from slmreason.verify.rewards import AnswerReward

GROUP = 8
BATCH = 64
"""Completions that are graded together: a GRPO step of eight problems."""
Pairs = list[tuple[Problem, str]]


class Speed(NamedTuple):
    """Verdicts a second, by repetition."""

    cold: list[float]
    warm: list[float]
    peer: list[float]


def embedded(count: int, rng: random.Random) -> Pairs:
    """Groups of the five families: some completions right, some with a slip in the last step, some without a box."""
    pairs: Pairs = []
    for family in FAMILIES:
        for problem in make_problems(family, "train", -(-count // (GROUP * len(FAMILIES)))):
            steps = [step.text for step in rebuild(problem.id).steps]
            pairs += [(problem, _completion(steps, problem.answer, rng)) for _ in range(GROUP)]
    groups = [pairs[start : start + GROUP] for start in range(0, len(pairs), GROUP)]
    rng.shuffle(groups)
    return [pair for group in groups for pair in group][:count]


def _completion(steps: list[str], answer: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        answer = rng.choice("ABCD") if answer.isalpha() else str(int(answer) + rng.choice((-10, -1, 1, 2, 10)))
    text = write_solution(steps, answer)
    return text if rng.random() < 0.9 else text.replace("\\boxed{", "").replace("}", "")


def recorded(path: Path, count: int) -> Pairs:
    """What models really wrote."""
    groups, _, _ = read_recorded(path)
    return [(group.problem, rollout.text) for group in groups for rollout in group.rollouts][:count]


def algebra(count: int, rng: random.Random) -> Pairs:
    """Groups in which no answer is a plain number or the gold answer's own text."""
    pairs: Pairs = []
    for i in range(-(-count // GROUP)):
        gold, right, wrong = _ALGEBRA[i % len(_ALGEBRA)](rng)
        problem = Problem(f"algebra-{i}", "?", gold)
        options = (*right, *wrong)
        pairs += [(problem, f"Therefore the answer is $\\boxed{{{rng.choice(options)}}}$.") for _ in range(GROUP)]
    return pairs[:count]


Written = tuple[str, tuple[str, ...], tuple[str, ...]]
"""A gold answer, other ways to write it, and wrong answers."""


def _fraction(rng: random.Random) -> Written:
    a, b, k = rng.randint(2, 999), rng.randint(1000, 1999), rng.randint(2, 9)
    right = (rf"\frac{{{k * a}}}{{{k * b}}}", rf"\dfrac{{{a * 2}}}{{{b * 2}}}", f"{a * 3}/{b * 3}")
    return (
        rf"\frac{{{a}}}{{{b}}}",
        right,
        (rf"\frac{{{a + 1}}}{{{b}}}", rf"\frac{{{b}}}{{{a}}}", rf"-\frac{{{a}}}{{{b}}}"),
    )


def _surd(rng: random.Random) -> Written:
    a, b, k = rng.randint(1, 99), rng.choice((2, 3, 5, 7, 11, 13)), rng.randint(2, 9)
    right = (rf"\sqrt{{{k * k * b}}}+{a}", rf"{a}+\sqrt{{{k * k * b}}}", rf"{a}+{k}{b}^{{1/2}}")
    return rf"{a}+{k}\sqrt{{{b}}}", right, (rf"{a}-{k}\sqrt{{{b}}}", rf"{a + 1}+{k}\sqrt{{{b}}}", rf"\sqrt{{{b}}}")


def _set(rng: random.Random) -> Written:
    a, b, c = rng.sample(range(100, 999), 3)
    right = (rf"\{{{c}, {b}\}} \cup \{{{a}\}}", rf"\{{{a}\}} \cup \{{{b}, {c}\}}")
    return rf"\{{{a}\}} \cup \{{{c}, {b}\}}", right, (rf"\{{{a}\}} \cup \{{{b}, {c + 1}\}}", rf"\{{{a}, {b}\}}")


def _polynomial(rng: random.Random) -> Written:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    right = (f"(x+{a})(x+{b})", rf"x^2+{a}x+{b}x+{a * b}")
    return f"x^2+{a + b}x+{a * b}", right, (f"(x-{a})(x-{b})", f"x^2+{a + b}x+{a * b + 1}", f"(x+{a})^2")


_ALGEBRA: tuple[Callable[[random.Random], Written], ...] = (_fraction, _surd, _set, _polynomial)


def measure(rounds: Sequence[Pairs]) -> tuple[Speed, list[tuple[bool, bool]]]:
    """Speeds and both sides' verdicts; each round has completions that neither side has seen, the first is for both
    to get going: workers start, parsers build their tables."""
    reward, speed = AnswerReward(), Speed([], [], [])
    verdicts: list[tuple[bool, bool]] = []
    for number, pairs in enumerate(rounds):
        shared_pool(reward.limits)._known.clear()
        answers._answer_plan.cache_clear()
        cold, ours = _timed(partial(_ours, reward, pairs), len(pairs))
        warm, _ = _timed(partial(_ours, reward, pairs), len(pairs))
        peer, peers = _timed(partial(_peers, pairs), len(pairs))
        if number > 0:
            verdicts += zip(ours, peers, strict=True)
            for rates, rate in zip(speed, (cold, warm, peer), strict=True):
                rates.append(rate)
    return speed, verdicts


def _ours(reward: AnswerReward, pairs: Pairs) -> list[bool]:
    batches = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    return [verdict.correct for batch in batches for verdict in reward.grade(batch)]


def _peers(pairs: Pairs) -> list[bool]:
    # The dollar signs say that a gold answer is LaTeX; without them it would see in most of these some number.
    return [verify(parse(f"${problem.answer}$"), parse(text)) for problem, text in pairs]


def _timed(grade: Callable[[], list[bool]], count: int) -> tuple[float, list[bool]]:
    began = time.perf_counter()
    verdicts = grade()
    return count / (time.perf_counter() - began), verdicts


def row(name: str, pairs: Pairs, repetitions: int) -> dict[str, Any]:
    """One workload's result; both sides' verdicts beside it, because a fast wrong answer is worth nothing."""
    size = len(pairs) // (repetitions + 1)
    speed, verdicts = measure([pairs[size * i : size * (i + 1)] for i in range(repetitions + 1)])
    cold, warm, peer = (statistics.median(rates) for rates in speed)
    return {
        "workload": name, "verdicts_per_round": size, "right": sum(ours for ours, _ in verdicts),
        "right_by_peer": sum(peers for _, peers in verdicts), "of": len(verdicts),
        "differing": sum(ours != peers for ours, peers in verdicts),
        "cold_per_s": round(cold), "warm_per_s": round(warm), "peer_per_s": round(peer),
        "cold_ratio": round(cold / peer, 1), "warm_ratio": round(warm / peer, 1),
        "all": {key: [round(rate) for rate in rates] for key, rates in speed._asdict().items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="recorded completions: JSONL with question, gold and response")
    parser.add_argument("--count", type=int, default=800, help="verdicts in a round; a quarter of that for algebra")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rng = random.Random(options.seed)
    count = options.count * (options.repetitions + 1)
    workloads = {"embedded families": embedded(count, rng)}
    if options.data:
        workloads["recorded completions"] = recorded(options.data, count)
    workloads["algebra only"] = algebra(count // 4, rng)
    rows = []
    for name, pairs in workloads.items():
        rows.append(found := row(name, pairs, options.repetitions))
        print(
            f"{name}: {found['cold_per_s']} verdicts/s cold, {found['warm_per_s']} warm, math-verify "
            f"{found['peer_per_s']}; ratio {found['cold_ratio']} and {found['warm_ratio']}",
            flush=True,
        )
    data = f" --data {options.data.name}" if options.data else ""
    result = {
        "command": f"python -m benchmarks.verdicts{data} --count {options.count} --repetitions {options.repetitions}"
        f" --seed {options.seed}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {AnswerReward().limits.num_workers} workers",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("slmreason", "math-verify", "latex2sympy2_extended", "sympy")},
        "workloads": rows,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
