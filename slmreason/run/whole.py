"""Where a whole run stands: which of its stages it is in, and about how long the rest will take.

What is left is counted by kinds of work, since each has a speed of its own: completions of benchmarks, rollouts of
probes, traces, rows of a fit, rollouts of GRPO with the steps on them. A kind takes as long as it took so far in this
run. One that has not been done yet is taken for the nearest that has: sampling at the same tokens a second, a row of
CFT like one of SFT, a critique like a trace, a rollout of GRPO like sampling and a row of SFT. Where there is not even
that, no more is said than that the run takes longer; and nothing where it is not known what is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from slmreason.run.bars import Draw, are_shown

Part = Literal["scores", "probe", "critiques", "traces", "fit", "again", "validation", "benchmarks", "curve"]
"""What a stage is made of, in the order in which it is done; `again` measures at the ends of a fit's epochs. The last
may come at any time: benchmarks where the run's tokens pass a budget."""
PARTS: tuple[Part, ...] = get_args(Part)
ANY_TIME: Part = "curve"
FORESEEN: tuple[Part, ...] = ("probe", "curve")
"""What is done of these, a forecast leaves out by itself."""
SAMPLED = ("probe", "validation", "benchmarks")
"""Kinds that sample and do nothing else: what a token takes is seen in them."""
ROWS = ("sft", "cft")
"""Kinds that train on rows and do nothing else."""
LIKE = {"cft": "sft", "sft": "cft", "critiques": "traces"}
"""What a kind is taken for that has not been done yet."""
DRAWN_EVERY_S = 1.0
TELLING_SHARE = 0.05
"""Of the tokens of a run: what these took tells what the others will."""
Clock = Callable[[], float]


@dataclass(frozen=True)
class Portion:
    """Work of one kind."""

    units: float
    """Completions, problems, groups or rows, as the kind counts."""
    longest: int = 0
    """Tokens that are sampled for a unit, at most; 0 where nothing is."""


Plan = Mapping[Part, Portion]
"""What a stage will do, about."""
Forecast = Callable[[int], Sequence[Plan] | None]
"""Number of a stage -> what it and all stages after it will do; None where nobody can know yet. 0 is the base."""


class UnderWay(Protocol):
    """Work that has begun."""

    kind: str
    max_new_tokens: int
    away: float
    """Seconds of it that other work took."""

    @property
    def left(self) -> float:
        """Units that are still to be done."""
        ...


@dataclass
class Rate:
    """What a kind of work took so far."""

    units: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Left:
    """What is left of a run."""

    seconds: float
    is_all: bool
    """False where some of the work is of a kind whose speed nobody knows yet: it comes on top."""


@dataclass
class WholeRun:
    """Counts what a run has done, and says what is left. Without stages, as in a data step, it says nothing."""

    clock: Clock = time.monotonic
    stages: Sequence[str] = ()
    """Names of all stages; the first is the base, before the first fit."""
    forecast: Forecast = lambda number: None
    deadline: float | None = None
    """Of the clock: the run does not go beyond."""
    began: float = 0.0
    """Of the clock."""
    spent: Callable[[], float] | None = None
    """Share of its tokens that the run has taken, where they are limited: it ends with them."""
    draw: Draw = lambda share, said: None  # noqa: E731 - a field
    """Shows it."""
    number: int = 0
    """Of the present stage."""
    _reached: int = 0
    _begun: dict[str, float] = field(default_factory=dict)
    _ahead: dict[tuple[str, int], float] | None = None
    """Units by kind and `Portion.longest`, of what comes after the work under way."""
    _under_way: list[tuple[Part, UnderWay]] = field(default_factory=list)
    _rates: dict[str, Rate] = field(default_factory=dict)
    _drawn: float = float("-inf")

    # -- what is told -----------------------------------------------------------------------------------------------

    def enter(self, number: int) -> None:
        """A stage begins."""
        self.number, self._reached, self._begun = number, 0, {}
        self._look_ahead()
        self.show()

    def kind_of(self, part: Part) -> str:
        """Of the work that a part of the present stage is."""
        return self._kind(part, self.stages[self.number] if self.stages else "")

    def begin(self, part: Part, work: UnderWay) -> None:
        """Work begins, perhaps within other work, which waits for it."""
        if part != ANY_TIME:
            self._reached = max(self._reached, PARTS.index(part))
        self._begun[part] = self._begun.get(part, 0.0) + max(work.left, 1.0)
        self._under_way.append((part, work))
        self._look_ahead()

    def end(self, work: UnderWay, seconds: float) -> None:
        """It has ended.

        Args:
            seconds: from its beginning on, whatever was done within it.
        """
        part = next(part for part, each in self._under_way if each is work)
        self._under_way.remove((part, work))
        if self._under_way:
            self._under_way[-1][1].away += seconds
        if part in FORESEEN:
            del self._begun[part]
        self.show()

    def measured(self, kind: str, units: float, tokens: int, seconds: float) -> None:
        """What some units of a kind took, all of which have ended."""
        rate = self._rates.setdefault(kind, Rate())
        rate.units += units
        rate.tokens += tokens
        rate.seconds += seconds

    # -- what is said -----------------------------------------------------------------------------------------------

    def said(self) -> str:
        """Which stage the run is in, and how long it still takes, as far as that is known; empty without stages."""
        if len(self.stages) < 2:
            return ""
        last = len(self.stages) - 1
        all_stages = str(last) if self.spent is None else f"at most {last}"
        here = f"stage {self.number} of {all_stages}" if self.number else f"before stage 1 of {all_stages}"
        left = self.left()
        if left is None:
            return here
        return f"{here}, {'about' if left.is_all else 'over'} {duration(left.seconds)} left"

    def left(self) -> Left | None:
        """None where nothing has been measured, or where what is left is not known."""
        if self._ahead is None or not self._rates:
            return None
        begun = [(work.kind, work.max_new_tokens, work.left) for _, work in self._under_way]
        ahead = [(kind, longest, units) for (kind, longest), units in self._ahead.items()]
        each = [self._seconds(kind, units, longest) for kind, longest, units in (*begun, *ahead) if units > 0]
        known = [seconds for seconds in each if seconds is not None]
        if each and not known:
            return None
        seconds, is_all = sum(known), len(known) == len(each)
        most = self._most()
        return Left(seconds, is_all) if seconds <= most else Left(most, is_all=True)

    def _most(self) -> float:
        """Seconds after which the time or the tokens of the run are used up."""
        now, most = self.clock(), math.inf
        if self.deadline is not None:
            most = max(0.0, self.deadline - now)
        if self.spent is not None and (share := self.spent()) >= TELLING_SHARE:
            most = min(most, max(0.0, (now - self.began) * (1 - share) / share))
        return most

    def show(self) -> None:
        """Draws it, no more often than every second."""
        now = self.clock()
        if not are_shown() or now - self._drawn < DRAWN_EVERY_S:
            return
        self._drawn = now
        left, passed = self.left(), now - self.began
        is_known = left is not None and left.is_all and passed > 0
        self.draw(passed / (passed + left.seconds) if is_known and left is not None else 0.0, self.said())

    # -- what is ahead ----------------------------------------------------------------------------------------------

    def _look_ahead(self) -> None:
        """Sums up what comes after the work under way."""
        plans = self.forecast(self.number) if self.stages else None
        if plans is None:
            self._ahead = None
            return
        self._ahead = {}
        rest = [self._rest(plans[0]), *plans[1:]]
        for name, plan in zip(self.stages[self.number :], rest, strict=True):
            for part, portion in plan.items():
                kind = self._kind(part, name), portion.longest
                self._ahead[kind] = self._ahead.get(kind, 0.0) + portion.units

    def _rest(self, plan: Plan) -> dict[Part, Portion]:
        """Of the present stage: what has not begun, of those parts that it has not passed."""
        rest: dict[Part, Portion] = {}
        for part in PARTS[self._reached :]:
            if part in plan and not (part == "fit" and part in self._begun):  # a stage has one fit, however many rows
                rest[part] = Portion(max(0.0, plan[part].units - self._begun.get(part, 0.0)), plan[part].longest)
        return rest

    @staticmethod
    def _kind(part: Part, stage: str) -> str:
        return {"fit": stage, "again": "probe", "curve": "benchmarks"}.get(part, part)

    def _seconds(self, kind: str, units: float, longest: int) -> float | None:
        """What so much work of a kind takes; None where there is nothing to tell it by."""
        rate = self._rates.get(kind) or self._rates.get(LIKE.get(kind, ""))
        if rate is not None and rate.units:
            return units * rate.seconds / rate.units
        sampling = self._sampling(longest) if longest else 0.0
        training = self._training() if kind == "grpo" else 0.0
        if sampling is None or training is None or sampling + training == 0:
            return None
        return units * (sampling + training)

    def _sampling(self, longest: int) -> float | None:
        """Seconds of a completion."""
        done = [self._rates[kind] for kind in SAMPLED if kind in self._rates]
        units, tokens = sum(rate.units for rate in done), sum(rate.tokens for rate in done)
        if not tokens:
            return None
        return min(tokens / units, longest) * sum(rate.seconds for rate in done) / tokens

    def _training(self) -> float | None:
        """Seconds of a row."""
        done = next((self._rates[kind] for kind in ROWS if kind in self._rates), None)
        return done.seconds / done.units if done is not None and done.units else None


def duration(seconds: float) -> str:
    """Seconds as a person says them: `40 s`, `7 min`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
