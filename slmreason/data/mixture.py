"""Several data sets as one pool: each read with its own columns, mixed by weight, and a part of them held out."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slmreason.data.columns import Columns
from slmreason.data.reading import Loaded
from slmreason.data.sources import load_problems, most_common, source_of
from slmreason.records import Problem
from slmreason.verify.by_source import RewardBySource
from slmreason.verify.gym import PREFIX
from slmreason.verify.gym_reward import GymReward
from slmreason.verify.rewards import RewardFn
from slmreason.verify.terms import RewardTerms

log = logging.getLogger(__name__)
KEYS = "path, columns, weight, reward, limit and split"


@dataclass(frozen=True)
class Entry:
    """One data set among several."""

    path: str
    """Where it lies: anything that `data.train` can be by itself."""
    columns: Columns | None = None
    """Which of its columns is what; `data.columns` where this is not set."""
    weight: float | None = None
    """Its part of the pool beside the other weights; 1 where only others have one, and where none has, all rows."""
    reward: RewardFn | None = None
    """Who grades answers to it, wherever a data set of its name stands; `reward` where this is not set."""
    limit: int | None = None
    """Read no more than so many rows of it."""
    split: str | None = None
    """Split of a hub dataset."""

    def __post_init__(self) -> None:
        if not self.path.strip() or self.path.lstrip()[0] in "[{":
            raise ValueError(f"{self.path!r} is no data set; one among several is a path, or has {KEYS}")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"{self.path}: weight must be above 0, got {self.weight}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"{self.path}: limit must be at least 1, got {self.limit}")

    def read(self, key: str, wants: Callable[[str], bool] | None = None) -> Loaded:
        """What the data set gives.

        Args:
            key: of the config that names it.
            wants: tells the columns that its problems keep.

        Raises:
            ValueError: it cannot be had or read, or has no usable row; the message begins with the key.
        """
        try:
            return load_problems(self.path, self.columns, self.split, self.limit, wants)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error


def entries_of(
    sources: str | Sequence[str | Entry],
    key: str,
    columns: Columns | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> tuple[Entry, ...]:
    """The data sets of a config key, each with what it does not say itself.

    Args:
        key: of the config, for the errors.
        limit: of every data set; one that has a limit of its own is read up to the smaller.

    Raises:
        ValueError: there is none, or one is none; the message names the key.
    """
    listed = [sources] if isinstance(sources, str | Entry) else list(sources)
    if not listed:
        raise ValueError(f"{key}: an empty list names no data set")
    try:
        entries = [Entry(each) if isinstance(each, str) else each for each in listed]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return tuple(
        replace(
            entry,
            columns=entry.columns or columns,
            split=entry.split or split,
            limit=min((each for each in (entry.limit, limit) if each is not None), default=None),
        )
        for entry in entries
    )


def read_pool(
    entries: Sequence[Entry],
    keep: Callable[[Loaded], Loaded],
    seed: int,
    wants: Callable[[str], bool] | None = None,
) -> Loaded:
    """The problems of all data sets, drawn by weight where there are weights.

    Args:
        keep: rejects the problems of a data set that are not to be trained on, before any is drawn.
        seed: of the draw.
        wants: which columns of their rows the problems keep for a reward function; None keeps none.

    Raises:
        ValueError: a data set cannot be read, or every problem of it is rejected.
    """
    parts = [_usable(entry, keep(entry.read("data.train", wants))) for entry in entries]
    if len(parts) == 1:
        return parts[0]
    parts = _told_apart(parts)
    if any(entry.weight is not None for entry in entries):
        parts = _by_weight(entries, parts, seed)
    else:
        log.info("data.train: %s", "; ".join(f"{len(part.problems)} of {part.name}" for part in parts))
    places: dict[str, str] = {}
    for part in parts:
        places |= part.places
    return Loaded(
        name=", ".join(entry.path for entry in entries),
        problems=tuple(problem for part in parts for problem in part.problems),
        rejects=tuple(reject for part in parts for reject in part.rejects),
        places=places,
    )


def _usable(entry: Entry, loaded: Loaded) -> Loaded:
    if not loaded.problems:
        last = loaded.rejects[-1]
        raise ValueError(f"data.train: {entry.path}: every problem was rejected: {most_common(loaded.rejects)}; "
                         f"the last in {last.where}: {last.reason}")  # fmt: skip
    return loaded


def _told_apart(parts: Sequence[Loaded]) -> list[Loaded]:
    """The same data sets, no two problems with one id: what is the same problem is rejected, another gets a new id."""
    seen: dict[str, str] = {}
    found = []
    for number, part in enumerate(parts, start=1):
        keys = {problem.id: problem.key for problem in part.problems}
        twice = {i: "the problem stands twice: a data set before this one has it too" for i, key in keys.items()
                 if seen.get(i) == key}  # fmt: skip
        part = part.without(twice)
        new = {problem.id: f"{problem.id}@{number}" for problem in part.problems if problem.id in seen}
        part = replace(
            part,
            problems=tuple(replace(p, id=new.get(p.id, p.id)) for p in part.problems),
            places={new.get(i, i): location for i, location in part.places.items()},
        )
        seen |= {problem.id: problem.key for problem in part.problems}
        found.append(part)
    return found


def _by_weight(entries: Sequence[Entry], parts: Sequence[Loaded], seed: int) -> list[Loaded]:
    """As many problems of each as its weight says, by lot, so that the pool is as large as they allow."""
    weights = [1.0 if entry.weight is None else entry.weight for entry in entries]
    counts = shares([len(part.problems) for part in parts], weights)
    drawn = []
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        lot = random.Random(f"{seed}/mixture/{number}").sample(range(len(part.problems)), count)
        drawn.append(replace(part, problems=tuple(part.problems[at] for at in sorted(lot))))
    log.info("data.train: by weight %s", "; ".join(
        f"{count} of {len(part.problems)} of {entry.path} ({count / sum(counts):.0%})"
        for entry, part, count in zip(entries, parts, counts, strict=True)
    ))  # fmt: skip
    return drawn


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many of each are drawn: in proportion to the weights, one at least, and all of one of them.

    Args:
        sizes: how many there are of each, none of them 0.
    """
    scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [min(size, max(1, round(scale * weight))) for size, weight in zip(sizes, weights, strict=True)]


def held_out(problems: Sequence[Problem], share: float) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(what is trained on, what is held out), told by the problems' keys: the same whatever else the pool holds.

    Of two problems or more at least one is in each.

    Raises:
        ValueError: all problems are the same one, so that none can be held out.
    """
    if not share:
        return tuple(problems), ()
    places = {problem.key: int(problem.key, 16) / 16 ** len(problem.key) for problem in problems}
    if len(places) < 2:
        raise ValueError(f"data.holdout: {share} of {len(places)} problem leaves nothing to train on")
    order = sorted(places, key=lambda key: places[key])
    chosen = {key for key in order if places[key] < share} or {order[0]}
    chosen -= {order[-1]}
    return (
        tuple(problem for problem in problems if problem.key not in chosen),
        tuple(problem for problem in problems if problem.key in chosen),
    )


def reward_of(reward: RewardFn, entries: Sequence[Entry]) -> RewardFn:
    """Who grades answers to all these data sets: `reward`, but for those that have one of their own.

    The functions of a reward with several terms go on to count for all of them.

    The problems of reasoning-gym have their generators' scorers, where no other is given.

    Raises:
        ValueError: two of one name have different ones.
    """
    if isinstance(reward, RewardTerms):
        return reward.with_verifier(reward_of(reward.verifier, entries))
    own: dict[str, RewardFn] = {}
    of_gym = GymReward()
    for entry in entries:
        source, given = source_of(entry.path), entry.reward
        if given is None and source.startswith(PREFIX):
            given = of_gym
        if given is None:
            continue
        if source in own and not _same(own[source], given):
            raise ValueError(f"{entry.path}: two entries of {source} have different rewards; NAME=FILE gives a file a "
                             "name of its own")  # fmt: skip
        own.setdefault(source, given)
    return RewardBySource(reward, own) if own else reward


def _same(one: RewardFn, other: RewardFn) -> bool:
    return type(one) is type(other) and vars(one) == vars(other)
