"""The table of every config key, made from the parser and the docstrings: a mkdocs hook, so the page cannot go stale.

`python docs/config_keys.py` prints the same table. A key without a meaning is an error: the docs do not build.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from docstring_parser import DocstringStyle, parse, parse_from_object
from jsonargparse import set_parsing_settings

from slmreason.callbacks import DumpRollouts, SampleCompletions, TrainingHealth
from slmreason.cli.config import CLASS_KEYS, Parser, build_parser
from slmreason.cli.words import INNER, in_words
from slmreason.curriculum import CheckpointSettings, CurriculumSettings, ProbeSettings
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.sources import Columns
from slmreason.data.strata import Bands
from slmreason.evaluate.benchmarks import EvaluationSettings
from slmreason.modules.rescue import RescueSettings
from slmreason.modules.settings import CFTSettings, GRPOSettings, SFTSettings, ValidationSettings
from slmreason.runtime.backend import BackendSettings
from slmreason.student import Lora, Student
from slmreason.supervision.critique import CritiqueSettings
from slmreason.supervision.settings import BridgeSettings

MARK = "<!-- every config key -->"
"""Where the table goes on the page."""
OWNERS: dict[str, type] = {
    "student": Student,
    "student.lora": Lora,
    "data": ReasoningDataModule,
    "data.columns": Columns,
    "data.bands": Bands,
    "curriculum": CurriculumSettings,
    "curriculum.probe": ProbeSettings,
    "curriculum.checkpoint": CheckpointSettings,
    "sft": SFTSettings,
    "grpo": GRPOSettings,
    "grpo.rescue": RescueSettings,
    "cft": CFTSettings,
    "bridge": BridgeSettings,
    "critique": CritiqueSettings,
    "evaluation": EvaluationSettings,
    "validation": ValidationSettings,
    "backend": BackendSettings,
}
"""The class whose constructor a section is."""
WITHIN = {"student.lora": Lora, "data.columns": Columns}
"""Sections that may be null, so that the parser does not list their keys."""
CLASS_MEANINGS = {
    "rollout": "The rollout engine: a class with its arguments, listed below.",
    "reward": "The reward: a class with its arguments, listed below, or a list of terms: see [Extend it](extend.md).",
}
CALLBACKS: tuple[type, ...] = (DumpRollouts, SampleCompletions, TrainingHealth)
"""Of slmreason's callbacks those that a user configures; the others are put in by the run itself."""


@dataclass(frozen=True)
class Key:
    """One row of the table."""

    name: str
    type: str
    default: str
    meaning: str


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page before it is rendered."""
    return markdown.replace(MARK, table()) if MARK in markdown else markdown


def table() -> str:
    """Markdown with one table a section: the keys of slmreason with their meanings, then the Trainer's."""
    parser = build_parser("fit", "")
    keys = list(own_keys(parser))
    sections: dict[str, list[Key]] = {}
    for key in keys:
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    parts = []
    for section in sorted(sections, key=lambda name: (bool(name), list(OWNERS).index(name) if name in OWNERS else 0)):
        title = f"`{section}`" if section else "Keys without a section"
        parts.append(f"## {title}\n\n{_rows(sections[section])}")
    for section, base in CLASS_KEYS.items():
        for cls in classes(base):
            parts.append(f"## `{section}`: {cls.__name__}\n\n{_summary(cls)}\n\n{_rows(arguments(cls, section))}")
    for cls in CALLBACKS:
        name = f"slmreason.callbacks.{cls.__name__}"
        parts.append(f"## `trainer.callbacks`: {cls.__name__}\n\n{_summary(cls)} `class_path: {name}`, and under "
                     f"`init_args`:\n\n{_rows(arguments(cls, ''))}")  # fmt: skip
    listed = "\n".join(f"| `{key.name}` | {key.type} | {key.default} |" for key in trainer_keys(parser))
    parts.append(f"## `trainer`\n\n{TRAINER}\n\n| key | type | default |\n|---|---|---|\n{listed}")
    return "\n\n".join(parts)


TRAINER = """\
These are the arguments of Lightning's `Trainer`; their meanings stand in
[Lightning's documentation](https://lightning.ai/docs/pytorch/stable/common/trainer.html). What slmreason adds to them
stands [above](#what-slmreason-does-with-trainer-keys)."""


def own_keys(parser: Parser) -> Iterator[Key]:
    """Every key of slmreason: those that the parser has, and those of sections that may be null.

    Raises:
        ValueError: a key has no meaning in any docstring.
    """
    for action in parser._actions:
        name, hint = str(action.dest), getattr(action, "_typehint", None)
        if hint is None or name.startswith("trainer.") or name.endswith(".help"):
            continue
        section, _, last = name.rpartition(".")
        meaning = meanings(OWNERS[section]).get(last) if section else CLASS_MEANINGS.get(name, action.help or "")
        yield _key(name, in_words(hint), action.default, meaning)
    for section, cls in WITHIN.items():
        yield from arguments(cls, section)


def trainer_keys(parser: Parser) -> Iterator[Key]:
    """The arguments of Lightning's Trainer."""
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is not None and str(action.dest).startswith("trainer.") and not str(action.dest).endswith(".help"):
            yield Key(str(action.dest), in_words(hint), shown(action.default), "")


def classes(base: type) -> list[type]:
    """The classes of slmreason that can be chosen below `base`."""
    below: list[type] = base.__subclasses__()
    found = [cls for child in below for cls in (child, *classes(child))]
    usable = [cls for cls in found if not inspect.isabstract(cls) and cls.__module__.startswith("slmreason.")]
    return sorted((cls for cls in usable if cls not in INNER), key=lambda cls: cls.__name__)


def arguments(cls: type, section: str) -> list[Key]:
    """The arguments of a class's constructor as keys of a section, with those that it takes for another class."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser()
    parser.add_class_arguments(cls, section or None)
    found = []
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is not None:
            default = "required" if action.required else action.default
            meaning = " ".join((action.help or "").split())
            found.append(_key(str(action.dest), in_words(hint), default, meaning))
    return found


def meanings(cls: type) -> dict[str, str]:
    """What each argument of a class means: from `Args:` of its constructor, or the text under each field.

    What a class does not say, a class below which it stands says.
    """
    style, docs = DocstringStyle.GOOGLE, []
    for owner in reversed(cls.__mro__):
        if owner.__module__.startswith("slmreason."):
            docs += [parse_from_object(owner, style), parse(owner.__init__.__doc__ or "", style)]  # type: ignore[misc]
    return {p.arg_name: " ".join(p.description.split()) for doc in docs for p in doc.params if p.description}


def shown(value: Any) -> str:
    """A default as it would stand in YAML."""
    if value == "required":
        return "required"
    if hasattr(value, "class_path"):
        return f"`{value.class_path.rpartition('.')[2]}`"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, default=str)}`"


def _key(name: str, kind: str, default: Any, meaning: str | None) -> Key:
    if not meaning:
        raise ValueError(f"{name}: no docstring says what it means")
    return Key(name, kind, shown(default), outside_code(meaning))


def outside_code(text: str) -> str:
    """A text for a cell of a table: a bar would begin the next one, but for those within backticks."""
    parts = text.split("`")
    return "`".join(part if number % 2 else part.replace("|", "&#124;") for number, part in enumerate(parts))


def _summary(cls: type) -> str:
    return (parse(inspect.getdoc(cls) or "").short_description or "").strip()


def _rows(keys: list[Key]) -> str:
    if not keys:
        return "It has no arguments."
    lines = [f"| `{key.name}` | {key.type} | {key.default} | {key.meaning} |" for key in keys]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines])


if __name__ == "__main__":
    print(table())
