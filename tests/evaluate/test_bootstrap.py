"""The bootstrap against loops in plain Python, with the same draws."""

from __future__ import annotations

import numpy as np
import pytest

from slmreason.evaluate.bootstrap import DRAWS, estimate, resampled, shared_seeds

SEEDS, BUDGETS, PROBLEMS = 3, 2, 7


def test_a_draw_is_a_mean_over_seeds_and_problems_that_were_drawn_with_replacement() -> None:
    rng = np.random.default_rng(5)
    right = {
        arm: {name: rng.integers(0, 2, (SEEDS, BUDGETS, PROBLEMS)).astype(float) for name in "xy"} for arm in ("a", "b")
    }
    ours = resampled(right, rng_seed=11)
    same = np.random.default_rng(11)
    drawn_seeds = same.multinomial(SEEDS, [1 / SEEDS] * SEEDS, DRAWS)
    for name in "xy":  # each benchmark's problems are drawn once, for both arms
        drawn_problems = same.multinomial(PROBLEMS, [1 / PROBLEMS] * PROBLEMS, DRAWS)
        for arm in ("a", "b"):
            assert ours[arm][name].shape == (DRAWS, BUDGETS)
            for draw in (0, 1, DRAWS - 1):
                for budget in range(BUDGETS):
                    total = 0.0
                    for seed in range(SEEDS):
                        for problem in range(PROBLEMS):
                            times = int(drawn_seeds[draw][seed]) * int(drawn_problems[draw][problem])
                            total += times * float(right[arm][name][seed, budget, problem])
                    assert ours[arm][name][draw, budget] == pytest.approx(total / (SEEDS * PROBLEMS), rel=1e-12)


def test_the_interval_holds_the_middle_95_in_100_draws() -> None:
    found = estimate(0.5, np.arange(1001) / 1000)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.025, 0.975))


def test_seeds_are_those_that_every_arm_with_a_run_has() -> None:
    runs = [("a", 1), ("a", 2), ("b", 2), ("b", 3)]
    assert shared_seeds(runs, ["b", "a", "none"]) == (["b", "a"], [2])
    with pytest.raises(ValueError, match="no seed"):
        shared_seeds([("a", 1), ("b", 2)], ["a", "b"])
