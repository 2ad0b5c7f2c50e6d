"""Types in words, as choices, and messages about values of them in a line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest

import slmreason.rollout
import slmreason.teacher
from slmreason.cli.errors import in_a_line
from slmreason.cli.words import INNER, classes_below, in_words
from slmreason.rollout.engine import RolloutEngine
from slmreason.teacher.base import Teacher
from slmreason.verify.rewards import RewardFn


class Animal:
    """Nobody is only this."""


class Cat(Animal):
    pass


class Dog(Animal):
    pass


@dataclass
class Box:
    width: int
    height: int = 1


class Side(Enum):
    LEFT = 1
    RIGHT = 2


WORDS: list[tuple[Any, str]] = [
    (int, "a whole number"),
    (str, "a text"),
    (bool, "true or false"),
    (bool | None, "true, false, or null"),
    (float | None, "a number, or null"),
    (Union[int, float, None], "a number, or null"),  # noqa: UP007 - as others write it
    (Optional[int], "a whole number, or null"),  # noqa: UP045
    (Literal["a", "b"], "a or b"),
    (Literal["a", "b", "c"], "one of: a, b, or c"),
    (Literal["a", "b"] | None, "one of: a, b, or null"),
    (Literal["a"] | None, "a, or null"),
    (Literal["a"] | list[str], "a, or a list of texts"),
    (Union[Literal[16, 32], Literal["16", "bf16"], None], "one of: 16, 32, bf16, or null"),  # noqa: UP007
    (Side, "LEFT or RIGHT"),
    (list[int], "a list of whole numbers"),
    (tuple[int, ...], "a list of whole numbers"),
    (tuple[float, float], "a list of 2: a number, a number"),
    (list[Literal["sft", "grpo", "cft"]], "a list of sft, grpo or cft"),
    (list, "a list"),
    (dict[str, Any] | str | None, "a mapping, a text, or null"),
    (Mapping[str, int], "a mapping"),
    (Box | None, "a mapping {width, height}, or null"),
    (str | list[str | Box], "a text, or a list of texts or mappings {width, height}"),
    (Animal, "one of: Cat, Dog, or a class path"),
    (Animal | None, "one of: Cat, Dog, a class path, or null"),
    (Animal | list[str | dict[str, Any]], "one of: Cat, Dog, a class path, or a list of texts or mappings"),
    (Animal | Iterable[Animal] | bool,
     "one of: Cat, Dog, true, false, a class path, or a list of classes"),
    (str | timedelta | dict[str, int] | None, "a text, a duration, a mapping, or null"),
    (Path, "a path"),
    (Callable[[int], int], "the import path of a function"),
    (type, "a class path"),
    (Annotated[int, "above 0"], "a whole number"),
    (Any, "anything"),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "said"), WORDS, ids=[str(said) for _, said in WORDS])
def test_a_type_is_told_as_choices(hint: Any, said: str) -> None:
    assert in_words(hint) == said


def test_many_classes_are_not_told_one_by_one() -> None:
    class Plant:
        pass

    kept = [type(f"Plant{number}", (Plant,), {}) for number in range(9)]
    assert in_words(Plant | None) == "a class of Plant, by its name or path, or null"
    assert len(kept) == 9


def test_what_else_was_imported_is_not_listed() -> None:
    before = classes_below(RolloutEngine)

    class MyEngine(RolloutEngine):
        def sync(self, student: Any) -> None: ...

        def generate(self, *args: Any, **more: Any) -> Any: ...

    assert not inspect.isabstract(MyEngine)
    assert classes_below(RolloutEngine) == before


def test_the_classes_that_can_be_chosen_are_those_that_a_config_makes() -> None:
    for engine in ("HFEngine", "VLLMEngine"):  # a package gives its classes, and knows of them, when asked
        getattr(slmreason.rollout, engine)
    for teacher in ("APITeacher", "ProceduralTeacher", "TraceTeacher", "VLLMTeacher"):
        getattr(slmreason.teacher, teacher)
    assert {"HFEngine", "VLLMEngine"} <= set(classes_below(RolloutEngine))
    assert {"APITeacher", "ProceduralTeacher", "TraceTeacher", "VLLMTeacher"} <= set(classes_below(Teacher))
    below = {*classes_below(Teacher), *classes_below(RewardFn)}
    assert not below & {"LLMTeacher", *(cls.__name__ for cls in INNER)}


# -- messages ---------------------------------------------------------------------------------------------------------

UNION = """\
Parser key "{key}":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'float'>, <class 'NoneType'>]
  Errors:
    - {first}
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: 7 secrets"""
MESSAGES: dict[str, tuple[str, str]] = {
    "a type": ("Parser key \"a.b\":\n  Expected a <class 'int'>. Got value: 7 secrets", "a.b: takes WORDS"),
    "a union": (UNION.format(key="a.b", first="Expected a <class 'float'>"), "a.b: takes WORDS"),
    "in a file": (
        'Parser key "config": Parser key "a.b":\n  Expected a typing.Literal[\'a\']. Got value: 7 secrets',
        "a.b: takes WORDS",
    ),
    "a path that is none": (
        'Parser key "a.b":\n\n  - Expected a path but 7\nsecrets either not accessible or invalid\n'
        "  - Expected a dot import path string: 7 secrets",
        "a.b: takes WORDS",
    ),
    "a name": (
        UNION.format(key="kind", first="Expected a dot import path string: Nobody"),
        "kind: there is no class Nobody; it takes a class path",
    ),
    "a name that may be a secret": (
        UNION.format(key="kind", first="Expected a dot import path string: sk-7-secrets"),
        "kind: takes a class path",
    ),
    "a class that cannot be had": (
        UNION.format(key="kind", first="Problem with given class_path 'no.where':\n        No module named 'no'"),
        "kind: Problem with given class_path 'no.where': No module named 'no'",
    ),
    "an argument of a class": (UNION.format(key="kind", first="n: takes a number"), "kind.n: takes a number"),
    "an unknown argument": (
        UNION.format(key="kind", first="Option 'nn' is not accepted\n      did you mean: n?"),
        "kind: Option 'nn' is not accepted; did you mean: n?",
    ),
    "a constructor that refuses": (
        UNION.format(key="", first="kind: it needs n").partition("\n")[2],
        "kind: it needs n",
    ),
    "another message": ("Unable to parse", "Unable to parse"),
    "an unknown key": ('Parser key "nobody":\n  Expected', 'Parser key "nobody":\n  Expected'),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_about_a_value_is_a_line_with_the_choices_and_never_the_value(name: str) -> None:
    message, said = MESSAGES[name]
    line = in_a_line(message, {"a.b": "WORDS", "kind": "a class path"}.get)
    assert line == said
    assert "secrets" not in line
