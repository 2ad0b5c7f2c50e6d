"""Types in words, never in Python's syntax: `a number, or null`, `one of: HFEngine, VLLMEngine, or a class path`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from enum import Enum
from os import PathLike
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from lightning.pytorch.loggers.logger import DummyLogger

from slmreason.run.metrics import StageCSVLogger
from slmreason.teacher.base import FirstProcessTeacher
from slmreason.verify.by_source import RewardBySource
from slmreason.verify.terms import RewardTerms

INNER = (FirstProcessTeacher, RewardBySource, RewardTerms, StageCSVLogger, DummyLogger)
"""Classes that the program itself puts around others or in their place; nobody names them in a config."""
MOST_NAMES = 8
"""Of classes that are told one by one."""


@dataclass(frozen=True)
class Kind:
    """One of the things that a key takes."""

    one: str
    """`a whole number`."""
    many: str
    """`whole numbers`, of a list."""
    is_name: bool = False
    """It is written as it stands here: `grpo`, `HFEngine`, `true`."""


NULL = Kind("null", "nulls")
CLASS_PATH = Kind("a class path", "class paths")
PLAIN: dict[Any, Kind] = {
    str: Kind("a text", "texts"),
    int: Kind("a whole number", "whole numbers"),
    float: Kind("a number", "numbers"),
    timedelta: Kind("a duration", "durations"),
    Any: Kind("anything", "anything"),
    object: Kind("anything", "anything"),
    Callable: Kind("the import path of a function", "import paths of functions"),
}
LISTS = (list, tuple, set, frozenset, Sequence, Iterable)


def in_words(hint: Any) -> str:
    """What a key of this type takes, as choices in words.

    Args:
        hint: of a constructor's argument: a class, or what `typing` makes of classes.
    """
    return _joined(list(dict.fromkeys(_kinds(hint))))


def classes_below(base: type) -> list[str]:
    """Names of the classes that a user can choose: all below `base` that can be made from options alone.

    They are those of the base's package and of ours: what else was imported does not change what is said.
    """
    packages = {_package(base.__module__), _package(__name__)}
    return sorted(
        {
            cls.__name__
            for cls in _below(base)
            if _package(cls.__module__) in packages and cls not in INNER and not inspect.isabstract(cls)
        }
    )


def _below(base: type) -> Iterator[type]:
    found: list[type] = base.__subclasses__()
    for cls in found:
        yield cls
        yield from _below(cls)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _kinds(hint: Any) -> Iterator[Kind]:
    """The things that a type lets through, each on its own."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is None or hint is type(None):
        yield NULL
    elif origin in (Union, types.UnionType):
        yield from (kind for each in args for kind in _kinds(each))
    elif origin is Annotated:
        yield from _kinds(args[0])
    elif origin is Literal:
        yield from (_name(value) for value in args)
    elif hint is bool:
        yield from (_name("true"), _name("false"))
    elif origin in LISTS or hint in LISTS:
        yield _list(args, fixed=origin is tuple and Ellipsis not in args)
    else:
        yield from _of_one(hint, origin)


def _of_one(hint: Any, origin: Any) -> Iterator[Kind]:
    """The things that a type lets through which is no union, no list and no choice among names."""
    cls = origin or hint
    if (plain := PLAIN.get(cls)) is not None:
        yield plain
    elif is_dataclass(cls):
        keys = "{" + ", ".join(field.name for field in fields(cls) if field.init) + "}"
        yield Kind(f"a mapping {keys}", f"mappings {keys}")
    elif not isinstance(cls, type):
        yield Kind(str(getattr(cls, "__name__", "anything")), "values")
    elif issubclass(cls, Enum):
        yield from (_name(name) for name in cls.__members__)
    elif issubclass(cls, Mapping):
        yield Kind("a mapping", "mappings")
    elif issubclass(cls, PathLike):
        yield Kind("a path", "paths")
    elif cls is type:
        yield CLASS_PATH
    else:
        yield from _classes(cls)


def _classes(base: type) -> Iterator[Kind]:
    names = classes_below(base)
    if len(names) > MOST_NAMES:
        yield Kind(f"a class of {base.__name__}, by its name or path", f"classes of {base.__name__}")
    else:
        yield from (_name(name) for name in names)
        yield CLASS_PATH


def _list(args: tuple[Any, ...], fixed: bool) -> Kind:
    """A list of one kind of thing, or of several."""
    items = [each for each in args if each is not Ellipsis]
    if fixed and len(items) > 1:
        each = ", ".join(in_words(item) for item in items)
        return Kind(f"a list of {len(items)}: {each}", f"lists of {len(items)}")
    kinds = list(dict.fromkeys(kind for item in items for kind in _kinds(item)))
    many = [kind.many for kind in kinds]
    if CLASS_PATH in kinds:  # who they are is told where one is taken by itself
        many = ["classes", *(kind.many for kind in kinds if kind != CLASS_PATH and not kind.is_name)]
    if not many:
        return Kind("a list", "lists")
    listed = " or ".join([", ".join(many[:-1]), many[-1]] if many[1:] else many)
    return Kind(f"a list of {listed}", f"lists of {listed}")


def _name(value: Any) -> Kind:
    if value is None:
        return NULL
    return Kind(str(value), str(value), is_name=True)


def _joined(kinds: Sequence[Kind]) -> str:
    """`a`, `a, or b`, `one of: a, b, or c`: null comes last, and no whole number beside a number."""
    if PLAIN[float] in kinds:
        kinds = [kind for kind in kinds if kind != PLAIN[int]]
    names = [kind.one for kind in kinds if kind.is_name]
    others = [kind.one for kind in kinds if not kind.is_name and kind != NULL]
    said = [*names, *others, *([NULL.one] if NULL in kinds else [])]
    if len(said) == 2:
        return (" or " if said == names else ", or ").join(said)
    text = f"{', '.join(said[:-1])}, or {said[-1]}" if len(said) > 2 else said[0]
    is_choice = len(names) > 1 and names[:2] != ["true", "false"]
    return f"one of: {text}" if is_choice else text
