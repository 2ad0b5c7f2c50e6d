"""GRPO and its variants in plain Python, written from the papers' formulas: slow, and without a tensor anywhere."""

from __future__ import annotations

import math


def advantages(rewards: list[float], scaled: bool, epsilon: float = 1e-4) -> list[float]:
    mean = sum(rewards) / len(rewards)
    if not scaled:
        return [reward - mean for reward in rewards]
    variance = sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    return [(reward - mean) / (math.sqrt(variance) + epsilon) for reward in rewards]


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
) -> float:
    """The objective of each paper, negated. `new[i][t]`, `old[i][t]`: log-probs; `advantage[i]`: of completion i."""
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


def k3(new: float, reference: float) -> float:
    return math.exp(reference - new) - (reference - new) - 1
