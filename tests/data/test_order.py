"""Which problems are drawn: the orders on pools whose rates are known, and what is remembered of the draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from slmreason.data.ledger import Ledger
from slmreason.data.order import Choice, DrawnBatch, Draws, Informative, Order, OrderName, make_order
from slmreason.data.posterior import Posterior
from slmreason.records import Evidence, Place, Problem

POOL = [Problem(f"p{number}", f"What is {number} + 1?", str(number + 1)) for number in range(12)]
POSITIONS = {problem.id: number for number, problem in enumerate(POOL)}
SHUFFLED = [POOL[number] for number in (7, 2, 9, 0, 11, 4, 5, 1, 10, 3, 8, 6)]


def batch(count: int, problems: Sequence[Problem] = SHUFFLED, key: str = "epoch 0") -> DrawnBatch:
    return DrawnBatch(problems, POSITIONS, count, key)


def by_place(problems: Sequence[Problem]) -> Posterior:
    """The later in the pool, the easier."""
    places = np.array([POSITIONS[problem.id] for problem in problems], dtype=np.float64)
    return Posterior(0.5 + 100 * places, 0.5 + 100 * (len(POOL) - 1 - places))


def ids(problems: Sequence[Problem]) -> list[str]:
    return [problem.id for problem in problems]


def draws_of(order: OrderName | Order, cooldown: int | None = None) -> Draws:
    return Draws(make_order(order, group_size=8), cooldown)


@pytest.mark.parametrize(
    ("order", "expected"),
    [("file", ["p0", "p1", "p2"]), ("random", ["p7", "p2", "p9"]), ("easy_first", ["p11", "p10", "p9"])],
)
def test_the_first_draws_of_an_order(order: OrderName, expected: list[str]) -> None:
    assert ids(draws_of(order).first(batch(3), by_place)) == expected


def test_informative_takes_those_in_the_middle_first() -> None:
    drawn = draws_of("informative").first(batch(4), by_place)
    assert {POSITIONS[problem.id] for problem in drawn} <= {3, 4, 5, 6, 7, 8}


def test_the_more_rates_are_drawn_the_less_is_tried_that_is_little_known() -> None:
    def little_known(draws: int) -> int:
        """Of forty draws of two: how often one is of the ten of which nothing is known, beside two well known ones."""
        posterior = lambda problems: Posterior(  # noqa: E731
            *(np.array([4.0 if POSITIONS[p.id] < 2 else 0.5 for p in problems]) for _ in "ab")
        )
        found = 0
        for number in range(40):
            drawn = draws_of(Informative(draws=draws)).first(batch(2, key=str(number)), posterior)
            found += sum(POSITIONS[problem.id] >= 2 for problem in drawn)
        return found

    assert little_known(1) > 2 * little_known(16)
    with pytest.raises(ValueError, match=r"grpo\.order: Informative needs draws of at least 1"):
        Informative(draws=0)


@pytest.mark.parametrize("order", ["file", "random", "informative", "easy_first"])
def test_an_epoch_draws_each_problem_once_refills_too(order: OrderName) -> None:
    draws, one = draws_of(order), batch(3)
    drawn: list[Problem] = []
    while not draws.is_used_up(one):
        drawn += draws.first(one, by_place) + draws.more(one, 2, by_place)
    assert sorted(ids(drawn)) == sorted(ids(POOL))
    assert draws.step == 3  # of four that were planned
    assert not draws.is_used_up(batch(3, key="epoch 1"))


def test_file_order_is_kept_by_refills() -> None:
    draws, one = draws_of("file"), batch(3)
    drawn = draws.first(one, by_place) + draws.more(one, 2, by_place) + draws.first(one, by_place)
    assert ids(drawn) == [f"p{number}" for number in range(8)]


def test_a_problem_comes_back_after_its_cooldown_and_not_before() -> None:
    draws, few = draws_of("easy_first", cooldown=2), batch(3)
    steps = [ids(draws.first(few, by_place)) for _ in range(4)]
    assert steps == [["p11", "p10", "p9"], ["p8", "p7", "p6"], ["p5", "p4", "p3"], ["p11", "p10", "p9"]]


def test_where_all_are_cooling_down_a_step_takes_those_that_have_longest() -> None:
    draws, four = draws_of("easy_first", cooldown=9), batch(2, POOL[:4])
    steps = [ids(draws.first(four, by_place)) for _ in range(3)]
    assert steps == [["p3", "p2"], ["p1", "p0"], ["p3", "p2"]]
    assert draws.more(four, 2, by_place) == []


def informative_groups(order: OrderName, seed: int, steps: int = 40, group_size: int = 8) -> int:
    """Informative groups of a simulated pool of 400 that was probed once with four rollouts; eight draws a step."""
    rng = np.random.default_rng(seed)
    pool = [Problem(f"q{number}", "?", "1") for number in range(400)]
    rho = dict(zip(ids(pool), rng.beta(0.3, 0.3, size=len(pool)), strict=True))
    positions = {problem.id: number for number, problem in enumerate(pool)}
    ledger, found = Ledger(None), 0
    probe = [Evidence(name, 4, int(rng.binomial(4, rate))) for name, rate in rho.items()]
    ledger.take(probe, Place(1, "grpo"))
    draws = draws_of(order, cooldown=4 if order == "informative" else None)
    one = DrawnBatch(pool, positions, 8, str(seed))
    for _ in range(steps):
        for problem in draws.first(one, ledger.posterior):
            right = int(rng.binomial(group_size, rho[problem.id]))
            found += 0 < right < group_size
            ledger.take([Evidence(problem.id, group_size, right)], Place(1, "grpo"))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_informative_order_gives_more_informative_groups_than_random_at_equal_draws(seed: int) -> None:
    informative, by_lot = (informative_groups(order, seed) for order in ("informative", "random"))
    assert informative > 1.25 * by_lot


def test_the_prior_of_an_order_is_the_pool_s_and_not_that_of_a_set_that_evidence_chose() -> None:
    """The rates of what is solved now and then differ less than lots do: a prior fitted to it drowns the evidence."""
    rng = np.random.default_rng(0)
    pool = [Problem(f"q{number}", "?", "1") for number in range(600)]
    right = rng.binomial(4, rng.beta(0.5, 0.5, size=len(pool)))
    ledger = Ledger(None)
    ledger.take([Evidence(p.id, 4, int(s)) for p, s in zip(pool, right, strict=True)], Place(1, "sft"))
    solved = [p for p, s in zip(pool, right, strict=True) if 0 < s < 4]
    alone, among = ledger.posterior(solved), ledger.posterior(solved, among=pool)
    known = ledger.counts(solved).right / 4
    assert np.ptp(alone.mean) < 0.15 < 0.3 < np.ptp(among.mean) < np.ptp(known)
    whole = ledger.posterior(pool)
    chosen = [number for number, s in enumerate(right) if 0 < s < 4]
    np.testing.assert_array_equal(among.a, whole.a[chosen])


class Alternates(Order):
    """From both ends of the pool in turn; it counts its draws."""

    def __init__(self) -> None:
        self.draws = 0

    def draw(self, choice: Choice) -> Sequence[Problem]:
        self.draws += 1
        problems = choice.in_file_order
        return problems[: choice.count] if self.draws % 2 else problems[-choice.count :]

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws}

    def load_state_dict(self, state: Any) -> None:
        self.draws = state["draws"]


@pytest.mark.parametrize(
    ("order", "cooldown"), [("random", None), ("informative", None), ("informative", 1), (Alternates(), None)]
)
def test_what_was_saved_goes_on_as_if_nothing_had_been(order: OrderName | Order, cooldown: int | None) -> None:
    def steps(draws: Draws, count: int) -> list[list[str]]:
        return [ids(draws.first(batch(2), by_place) + draws.more(batch(2), 1, by_place)) for _ in range(count)]

    whole, begun, resumed = (draws_of(order, cooldown) for _ in range(3))
    expected = steps(whole, 4)
    assert steps(begun, 2) == expected[:2]
    resumed.load_state_dict(begun.state_dict())
    assert steps(resumed, 2) == expected[2:]
    assert resumed.describe() == whole.describe()


def test_a_fit_has_an_order_of_its_own() -> None:
    mine = Alternates()
    draws_of(mine).first(batch(2), by_place)
    assert mine.draws == 0


@pytest.mark.parametrize("drawn", [[], POOL[:3], [POOL[0], POOL[0]], [Problem("else", "?", "1")]], ids=len)
def test_an_order_that_draws_what_it_may_not_is_named(drawn: list[Problem]) -> None:
    class Wrong(Order):
        def draw(self, choice: Choice) -> Sequence[Problem]:
            return drawn

    with pytest.raises(ValueError, match=r"^grpo\.order: Wrong must draw 1 to 2 of the 12 problems"):
        draws_of(Wrong()).first(batch(2), by_place)
