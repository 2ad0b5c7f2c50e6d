"""GRPO and its variants in plain Python, written from the papers' formulas: slow, and without a tensor anywhere."""

from __future__ import annotations

import math


def advantages(rewards: list[float], scaled: bool, epsilon: float = 1e-4) -> list[float]:
    return scaled_advantages(rewards, "group" if scaled else "none", rewards, epsilon)


def scaled_advantages(
    rewards: list[float], scale: str, step_rewards: list[float], epsilon: float = 1e-4
) -> list[float]:
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if scale == "none":  # 2503.20783
        return centred
    if scale == "rloo":  # 2402.14740: less the mean of the others
        return [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
    if scale == "maxrl":  # 2602.02710
        return [value / mean if mean > 0 else 0.0 for value in centred]
    over = rewards if scale == "group" else step_rewards
    return [value / (deviation(over) + epsilon) for value in centred]


def deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def overlong(length: int, limit: int, cache: int) -> float:
    """2503.14476 eq. 13"""
    if length <= limit - cache:
        return 0.0
    return ((limit - cache) - length) / cache if length <= limit else -1.0


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def loss(
    kind: str,
    new: list[list[float]],
    old: list[list[float]],
    advantage: list[float],
    low: float,
    high: float,
    max_tokens: int,
    held: list[list[float]] | None = None,
    cap: float = 1.2,
    temperatures: tuple[float, float] = (0.9, 1.3),
) -> float:
    """The objective of each paper, negated. `new[i][t]`, `old[i][t]`: log-probs; `advantage[i]`: of completion i.

    `held[i][t]`: new log-probs where a paper stops the gradient, as CISPO does in the ratio.
    """
    if kind == "gmpo":  # 2507.20673: the geometric mean of ratios clipped on one side
        terms = []
        for n, o, a in zip(new, old, advantage, strict=True):
            ratios = [math.exp(x - y) for x, y in zip(n, o, strict=True)]
            kept = [min(r, math.exp(high)) if a > 0 else max(r, math.exp(-low)) for r in ratios]
            terms.append(math.prod(kept) ** (1 / len(kept)) * a)
        return -sum(terms) / len(terms)
    if kind == "sapo":  # 2511.20347
        terms = []
        for n, o, a in zip(new, old, advantage, strict=True):
            t = temperatures[0] if a > 0 else temperatures[1]
            gates = [4 / t / (1 + math.exp(-t * (math.exp(x - y) - 1))) for x, y in zip(n, o, strict=True)]
            terms.append(sum(gates) / len(gates) * a)
        return -sum(terms) / len(terms)
    if kind == "cispo":  # 2506.13585
        total = 0.0
        for n, o, h, a in zip(new, old, held or new, advantage, strict=True):
            total += sum(min(math.exp(z - y), cap) * a * x for x, y, z in zip(n, o, h, strict=True))
        return -total / sum(len(n) for n in new)
    if kind == "gspo":  # 2507.18071 eq. 5 and 7
        terms = []
        for n, o, a in zip(new, old, advantage, strict=True):
            ratio = math.exp(sum(x - y for x, y in zip(n, o, strict=True)) / len(n))
            terms.append(clipped(ratio, a, low, high))
        return -sum(terms) / len(terms)
    rows = [
        [clipped(math.exp(x - y), a, low, high) for x, y in zip(n, o, strict=True)]
        for n, o, a in zip(new, old, advantage, strict=True)
    ]
    if kind == "grpo":  # 2402.03300 eq. 3
        return -sum(sum(row) / len(row) for row in rows) / len(rows)
    if kind == "dapo":  # 2503.14476 eq. 8
        return -sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    assert kind == "dr_grpo"  # 2503.20783
    return -sum(sum(row) for row in rows) / (len(rows) * max_tokens)


def supervised(kind: str, new: list[float], old: list[float], held: list[float], high: float) -> float:
    """The mean loss of target tokens; `held`: new log-probs where a paper stops the gradient."""
    if kind == "dft":  # 2508.05629
        return -sum(math.exp(h) * n for n, h in zip(new, held, strict=True)) / len(new)
    if kind == "psft":  # 2508.17784
        ratios = [math.exp(n - o) for n, o in zip(new, old, strict=True)]
        return -sum(clipped(ratio, 1.0, 0.2, high) for ratio in ratios) / len(new)
    assert kind == "nll"
    return -sum(new) / len(new)


def trace_loss(new: list[float], weights: list[float], held: list[float], by_uncertainty: bool) -> float:
    """`held`: log-probs where the gradient is stopped, as in the weight p (1 - p) of 2508.11408."""
    factors = [math.exp(h) * (1 - math.exp(h)) if by_uncertainty else 1.0 for h in held]
    return -sum(w * f * n for w, f, n in zip(weights, factors, new, strict=True))


def gated(policy: float, informative: int, traces: list[list[float]], weight: float) -> float:
    """2509.04419: the mean over problems, each with its RL loss or its SFT loss. `traces`: the log-probs of each."""
    supervised = [-sum(trace) / len(trace) for trace in traces]
    return (informative * policy + weight * sum(supervised)) / (informative + len(traces))


def chord(policy: float, traces: list[list[float]], mu: float) -> float:
    """2508.11408, eq. of CHORD with the token weight phi: a mean over all tokens of the traces."""
    tokens = [value for trace in traces for value in trace]
    return (1 - mu) * policy + mu * trace_loss(tokens, [1.0] * len(tokens), tokens, True) / len(tokens)


def k3(new: float, reference: float) -> float:
    return math.exp(reference - new) - (reference - new) - 1
