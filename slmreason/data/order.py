"""Which problems GRPO draws: an `Order` chooses, `Draws` remembers what has been drawn.

The rows of an epoch are a set. Where nothing asks for more, they are shuffled and cut into steps beforehand
(`grpo.order: random`); otherwise each step draws its problems when it begins, and more of them in place of silent
groups, so that a draw sees what the steps before have shown.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from slmreason.data.posterior import Array, Posterior, informative_rate
from slmreason.records import Problem, RolloutGroup
from slmreason.rollout.engine import stable_seed
from slmreason.student.packing import PromptBatch

OrderName = Literal["file", "random", "informative", "easy_first"]
PosteriorOf = Callable[[Sequence[Problem]], Posterior]
"""What the evidence shows by now of each of some problems."""


@dataclass(frozen=True)
class Choice:
    """What is chosen from at one draw. Both tuples hold the same problems: those that may be drawn now."""

    in_file_order: tuple[Problem, ...]
    shuffled: tuple[Problem, ...]
    """In the order of the epoch's shuffle, which `data.seed` decides."""
    count: int
    """How many are wanted."""
    posterior: Posterior
    """What the evidence shows by now of each problem of `shuffled`."""
    rng: np.random.Generator
    """Of this draw alone."""

    def best(self, scores: Array) -> list[Problem]:
        """The `count` problems with the highest scores, which are in the order of `shuffled`."""
        order = np.argsort(-scores, kind="stable")
        return [self.shuffled[int(place)] for place in order[: self.count]]


class Order(ABC):
    """Chooses the problems of GRPO's steps. It lives for one fit; every process has its own and sees the same."""

    def observe(self, groups: Sequence[RolloutGroup]) -> None:  # noqa: B027 - the evidence is enough for most
        """Is told all groups of a step, silent ones too, before the next draw."""

    @abstractmethod
    def draw(self, choice: Choice) -> Sequence[Problem]:
        """The next problems: at least one and at most `choice.count`, each once."""

    def state_dict(self) -> dict[str, Any]:
        """What a fit needs in order to go on in its middle: numbers, text, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have none
        """Takes back what `state_dict` gave."""

    def metrics(self) -> dict[str, float]:
        """Logged after each step as `grpo/order/NAME`."""
        return {}


class FileOrder(Order):
    """As they stand in the pool."""

    def draw(self, choice: Choice) -> Sequence[Problem]:
        return choice.in_file_order[: choice.count]


class RandomOrder(Order):
    """As the epoch's shuffle has them."""

    def draw(self, choice: Choice) -> Sequence[Problem]:
        return choice.shuffled[: choice.count]


class EasyFirst(Order):
    """Those first whose rollouts are most often right."""

    def draw(self, choice: Choice) -> Sequence[Problem]:
        return choice.best(choice.posterior.mean)


class Informative(Order):
    """Those whose groups will probably have right and wrong rollouts.

    Thompson's way: a rate is drawn from each problem's posterior and taken for true, so that what is little known is
    tried now and then.
    """

    def __init__(self, group_size: int = 8, draws: int = 1) -> None:
        """
        Args:
            group_size: Rollouts of a group.
            draws: Rates drawn of each problem, over which the probability is averaged. The more, the less often what is
                little known is tried, and the fewer groups are silent.
        """
        if draws < 1:
            raise ValueError(f"grpo.order: Informative needs draws of at least 1, got {draws}")
        self.group_size, self.draws = group_size, draws

    def draw(self, choice: Choice) -> Sequence[Problem]:
        rates = [informative_rate(choice.posterior.draws(choice.rng), self.group_size) for _ in range(self.draws)]
        return choice.best(np.mean(rates, axis=0))


def make_order(order: OrderName | Order, group_size: int) -> Order:
    """A fresh order for one fit.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(order, Order):
        return deepcopy(order)
    if order == "informative":
        return Informative(group_size)
    others: dict[str, type[Order]] = {"file": FileOrder, "random": RandomOrder, "easy_first": EasyFirst}
    if order not in others:
        raise ValueError(f"grpo.order must be one of {', '.join(get_args(OrderName))} or a class, got {order!r}")
    return others[order]()


class DrawnBatch(PromptBatch):
    """A GRPO step whose problems are drawn when it begins; `problems` is the whole set of the epoch, shuffled."""

    def __init__(self, problems: Sequence[Problem], positions: Mapping[str, int], count: int, key: str) -> None:
        """
        Args:
            positions: place in the pool by problem id.
            count: problems of a step.
            key: names the epoch in the run, and the seed.
        """
        super().__init__(problems)
        self.in_file_order = tuple(sorted(self.problems, key=lambda problem: positions[problem.id]))
        self.count, self.key = count, key


@dataclass
class Draws:
    """What a fit has drawn so far.

    Without a cooldown a problem is drawn once an epoch at most, by a refill too: the reserve of refills is what the
    order would draw next, and an epoch whose set is used up ends before its planned number of steps. With a cooldown a
    problem may come back in the same epoch.
    """

    order: Order
    cooldown: int | None = None
    """Steps for which a problem that was drawn is left alone; None: to the end of the epoch."""
    step: int = 0
    """Steps begun in this fit."""
    epoch: str = ""
    """Key of the epoch."""
    last_drawn: dict[str, int] = field(default_factory=dict)
    """Step by problem id; without a cooldown of this epoch alone."""
    times: Counter[str] = field(default_factory=Counter)
    """How often each problem was drawn in this fit, by id."""
    _draws_in_step: int = 0

    def is_used_up(self, batch: DrawnBatch) -> bool:
        """Whether the set has nothing left for another step of this epoch."""
        self._turn_to(batch)
        return self.cooldown is None and all(problem.id in self.last_drawn for problem in batch.problems)

    def first(self, batch: DrawnBatch, posterior: PosteriorOf) -> list[Problem]:
        """The problems that a step begins with. Where all are cooling down, those that have longest."""
        self._turn_to(batch)
        self.step += 1
        self._draws_in_step = 0
        ready = self._ready(batch)
        if not ready:
            by_age = sorted(batch.problems, key=lambda problem: self.last_drawn[problem.id])
            ready = {problem.id for problem in by_age[: batch.count]}
        return self._draw(batch, ready, batch.count, posterior)

    def more(self, batch: DrawnBatch, count: int, posterior: PosteriorOf) -> list[Problem]:
        """Up to so many further ones within the step; none where nothing is left."""
        return self._draw(batch, self._ready(batch), count, posterior)

    def describe(self) -> str:
        """How many problems the fit has drawn, and how often the same one."""
        most = max(self.times.values(), default=0)
        return f"{self.times.total()} groups of {len(self.times)} problems, the same one up to {most} times"

    def state_dict(self) -> dict[str, Any]:
        last_drawn = dict(self.last_drawn)
        return {
            "step": self.step,
            "epoch": self.epoch,
            "last_drawn": last_drawn,
            "times": dict(self.times),
            "order": self.order.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.epoch = state["step"], state["epoch"]
        self.last_drawn = dict(state["last_drawn"])
        self.times = Counter(state.get("times", {}))
        self.order.load_state_dict(state["order"])

    def _turn_to(self, batch: DrawnBatch) -> None:
        if batch.key != self.epoch and self.cooldown is None:
            self.last_drawn = {}
        self.epoch = batch.key

    def _ready(self, batch: DrawnBatch) -> set[str]:
        return {problem.id for problem in batch.problems if self._is_ready(problem)}

    def _is_ready(self, problem: Problem) -> bool:
        last = self.last_drawn.get(problem.id)
        if last is None:
            return True
        return self.cooldown is not None and self.step - last > self.cooldown

    def _draw(self, batch: DrawnBatch, ready: set[str], count: int, posterior: PosteriorOf) -> list[Problem]:
        if not ready or count < 1:
            return []
        self._draws_in_step += 1
        shuffled = tuple(problem for problem in batch.problems if problem.id in ready)
        seed = stable_seed(batch.key, self.step, self._draws_in_step)
        choice = Choice(
            in_file_order=tuple(problem for problem in batch.in_file_order if problem.id in ready),
            shuffled=shuffled,
            count=count,
            posterior=posterior(shuffled),
            rng=np.random.default_rng(seed),
        )
        drawn = list(self.order.draw(choice))
        ids = [problem.id for problem in drawn]
        if not 1 <= len(ids) <= count or len(set(ids)) < len(ids) or not ready.issuperset(ids):
            raise ValueError(
                f"grpo.order: {type(self.order).__name__} must draw 1 to {count} of the {len(ready)} problems that it "
                f"is given, each once; it drew {', '.join(ids) or 'none'}"
            )
        self.last_drawn |= dict.fromkeys(ids, self.step)
        self.times.update(ids)
        return drawn
