"""reasoning-gym's generators: which problems a source names, and the entry behind a problem, made again from its id.

A problem's id is its family, which is the generator with its dials as they are set, and its place in it:
`reasoning_gym:chain_sum?difficulty=2&seed=0&size=500#17`. The scorer needs the whole entry, so it is made from that.
The package is an extra (`gym`), imported here when the first problem is asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode

PREFIX = "reasoning_gym:"
SIZE, SEED = 500, 0
MAX_ANSWER_BYTES = 12_000
"""Of an answer that is scored, as it is written to the process; a longer one is wrong, a longer gold rejected."""
UNFIT = {"codeio": "it runs code that comes with its data, and what it makes is not the same twice"}
"""Generators that are refused, and why."""


@dataclass(frozen=True)
class GymFamily:
    """A generator with its dials set."""

    name: str
    size: int = SIZE
    seed: int = SEED
    level: int | None = None
    """Of every dial of the generator's curriculum; None leaves them as they are by default."""
    options: tuple[tuple[str, str], ...] = ()
    """Fields of the generator's config as they are written in the source."""

    @property
    def key(self) -> str:
        """What its problems' ids begin with."""
        level = {} if self.level is None else {"difficulty": self.level}
        query = urlencode([*level.items(), ("seed", self.seed), ("size", self.size), *self.options])
        return f"{PREFIX}{self.name}?{query}"


def families(source: str) -> list[GymFamily]:
    """The families of a source such as `reasoning_gym:chain_sum?size=500&difficulty=0,2&seed=1&max_digits=2`.

    Raises:
        ValueError: an option is not what it must be; the message names it.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    levels: list[int | None] = [None]
    try:
        size, seed = int(given.pop("size", SIZE)), int(given.pop("seed", SEED))
        if "difficulty" in given:
            levels = [int(level) for level in given.pop("difficulty").split(",")]
    except ValueError as error:
        raise ValueError(f"{source}: size, seed and difficulty take whole numbers ({error})") from error
    if size < len(levels) or any(level is not None and level < 0 for level in levels):
        raise ValueError(f"{source}: size must be at least 1 for each difficulty, and a difficulty at least 0")
    sizes = [size // len(levels) + (at < size % len(levels)) for at in range(len(levels))]
    return [
        GymFamily(name, share, seed, level, tuple(sorted(given.items())))
        for level, share in zip(levels, sizes, strict=True)
    ]


@lru_cache(maxsize=64)
def dataset(family: GymFamily) -> Any:
    """The generator as reasoning-gym makes it.

    Raises:
        ValueError: the package is not installed, or knows no such generator, dial or option.
    """
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ValueError(
            f"{PREFIX}{family.name}: reasoning-gym is not installed: pip install 'slmreason[gym]'"
        ) from error
    if family.name in UNFIT:
        raise ValueError(f"{PREFIX}{family.name}: refused: {UNFIT[family.name]}")
    if family.name not in factory.DATASETS:
        near = difflib.get_close_matches(family.name, factory.DATASETS, n=3) or sorted(factory.DATASETS)[:5]
        raise ValueError(f"{PREFIX}{family.name}: reasoning-gym has no such generator; near it are {', '.join(near)}")
    try:
        options = {name: _value(text) for name, text in family.options}
        return factory.create_dataset(family.name, **_dials(family, factory) | options, **_place(family))
    except (AssertionError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{family.key}: reasoning-gym refuses it: {error}") from error


def _place(family: GymFamily) -> dict[str, int]:
    return {"seed": family.seed, "size": family.size}


def _value(text: str) -> Any:
    """`3`, `true` and `[1, 2]` as JSON has them, anything else as a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dials(family: GymFamily, factory: Any) -> dict[str, Any]:
    """The fields of the generator's config that its curriculum sets at a level."""
    if family.level is None:
        return {}
    if not factory.has_curriculum(family.name):
        raise ValueError(f"{family.name} has no difficulty; its options by name are its dials")
    curriculum = factory.create_curriculum(family.name)
    most = max((len(dial.levels) - 1 for dial in curriculum.attributes.values()), default=0)
    if family.level > most:
        raise ValueError(f"difficulty {family.level} is beyond its dials, which go from 0 to {most}")
    curriculum.set_global_level(family.level)
    config = curriculum.generate_configuration()
    names = [
        getattr(dial, field)
        for dial in curriculum.attributes.values()
        for field in ("field_name", "lower_field_name", "upper_field_name")
        if getattr(dial, field, None)
    ]
    return {name: getattr(config, name) for name in names}


@lru_cache(maxsize=4096)
def entry_of(identifier: str) -> Mapping[str, Any]:
    """The entry behind a problem's id, as its generator makes it.

    Raises:
        ValueError: the id is of no problem of reasoning-gym, or cannot be made.
    """
    key, _, place = identifier.partition("#")
    if not key.startswith(PREFIX) or not place.isdigit():
        raise ValueError(f"{identifier!r} is not the id of a problem of reasoning-gym (reasoning_gym:NAME?...#PLACE)")
    [family] = families(key)
    entry: Mapping[str, Any] = dataset(family)[int(place)]
    return entry


def score(identifier: str, question: str, answer: str) -> float | None:
    """What the generator's own scorer gives an answer, from 0 to 1; None where the id makes another question.

    Args:
        question: its digest, by `digest`.
    """
    entry = entry_of(identifier)
    if digest(entry["question"]) != question:
        return None
    [family] = families(identifier.partition("#")[0])
    return float(dataset(family).score_answer(answer, entry))


def is_scorable(answer: str) -> bool:
    """Whether an answer is neither empty nor too long to be handed over."""
    return bool(answer) and len(json.dumps(answer)) <= MAX_ANSWER_BYTES


def digest(question: str) -> str:
    """Of a question, to tell whether an id still makes it."""
    return hashlib.sha256(" ".join(question.split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]
