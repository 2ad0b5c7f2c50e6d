"""Rows to problems: what each row says by itself, and what only the whole of a source can tell.

A row that cannot become a problem is rejected, with its id, file and line and the reason.
"""

from __future__ import annotations

import logging
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slmreason.data import chats
from slmreason.data.choices import NumberKey, hidden_options, letter_of, numbering, read_key, read_options
from slmreason.data.columns import Columns
from slmreason.data.golds import as_set, read_gold, unmatched
from slmreason.data.rows import as_text, has_column, text_of, value_of
from slmreason.records import Problem, Reject

log = logging.getLogger(__name__)
MAX_REASON_CHARS = 500
SHOWN_CHARS = 60


@dataclass(frozen=True)
class Loaded:
    """What a source gave."""

    name: str
    problems: tuple[Problem, ...]
    rejects: tuple[Reject, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    """File and line of each problem by its id; an embedded family has none."""

    def without(self, reasons: Mapping[str, str]) -> Loaded:
        """Sets aside the problems that a reason is given against, by id."""
        fallen = [p for p in self.problems if p.id in reasons]
        rejects = [Reject(p.id, self.places.get(p.id, self.name), reasons[p.id]) for p in fallen]
        kept = tuple(p for p in self.problems if p.id not in reasons)
        return replace(self, problems=kept, rejects=(*self.rejects, *rejects))

    def within(self, prompt_length: Callable[[str], int], limit: int, why: str) -> Loaded:
        """Sets aside the problems whose prompt has more than `limit` tokens.

        Args:
            prompt_length: question -> number of prompt tokens under the student's template.
            why: what sets the limit.
        """
        lengths = {p.id: prompt_length(p.question) for p in self.problems}
        return self.without({
            i: f"prompt too long: {length} tokens, {why}" for i, length in lengths.items() if length > limit
        })  # fmt: skip


@dataclass
class _Reading:
    """What has been read of a source, and what only the whole of it can tell."""

    name: str
    columns: Columns
    problems: dict[int, Problem] = field(default_factory=dict)
    """By the number of the row."""
    rejects: dict[int, Reject] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    keys: dict[int, NumberKey] = field(default_factory=dict)
    """Numbers that name options: what they mean says their column."""
    systems: dict[int, str] = field(default_factory=dict)
    """What conversations begin with."""

    def add(self, number: int, where: str, row: Any) -> None:
        """Reads a row; one that cannot become a problem is rejected."""
        identifier = f"{self.name}-{number:06d}"
        try:
            problem, key, system = _to_problem(row, self.columns, self.name, identifier)
            if problem.id in self.places:
                identifier = problem.id
                raise ValueError(f"the id stands twice: {self.places[problem.id]} has it too, and is kept")
        except ValueError as error:
            self.rejects[number] = Reject(identifier, where, str(error)[:MAX_REASON_CHARS])
            return
        self.places[problem.id], self.problems[number] = where, problem
        if key is not None:
            self.keys[number] = key
        if system is not None:
            self.systems[number] = system

    def reject(self, number: int, reason: str) -> None:
        """Rejects a row that was read."""
        problem = self.problems.pop(number)
        self.rejects[number] = Reject(problem.id, self.places.pop(problem.id), reason[:MAX_REASON_CHARS])

    def loaded(self) -> Loaded:
        rejects = tuple(self.rejects[number] for number in sorted(self.rejects))
        return Loaded(self.name, tuple(self.problems.values()), rejects, self.places)


def to_problems(rows: Iterator[tuple[str, Any]], columns: Columns, name: str, limit: int | None) -> Loaded:
    reading = _Reading(name, columns)
    beyond: list[NumberKey] = []
    for number, (where, row) in enumerate(rows):
        if limit is None or number < limit:
            reading.add(number, where, row)
        elif reading.keys:  # what the numbers mean says the whole column
            beyond += _number_key(row, columns)
        else:
            break
    _settle_keys(reading, beyond)
    _settle_systems(reading)
    never = unmatched(list(reading.problems.values()))
    for number, problem in list(reading.problems.items()) if never else []:
        if problem.id in never:
            reading.reject(number, never[problem.id])
    _say_contradictions(reading)
    return reading.loaded()


def _number_key(row: Any, columns: Columns) -> list[NumberKey]:
    try:
        _, key, _ = _to_problem(row, columns, "", "beyond the limit")
    except ValueError:
        return []
    return [key] if key is not None else []


def _settle_keys(reading: _Reading, beyond: Sequence[NumberKey]) -> None:
    """Gives each problem whose key is a number the letter that its column says."""
    if not reading.keys:
        return
    meaning, is_certain = numbering([*reading.keys.values(), *beyond], reading.columns.answer)
    if not is_certain:
        log.warning("%s: %d answers are numbers, and nothing in column %r tells which options they name: they are "
                    "read as %s; data.columns.answer_format index (from 0), index1 (from 1) or plain (an option's "
                    "text) says it for certain", reading.name, len(reading.keys), reading.columns.answer,
                    "texts of options" if meaning == "texts" else f"positions counted {meaning}")  # fmt: skip
    for number, key in reading.keys.items():
        try:
            reading.problems[number] = replace(reading.problems[number], answer=letter_of(key, meaning))
        except ValueError as error:
            reading.reject(number, str(error))


def _settle_systems(reading: _Reading) -> None:
    """Leaves out what many conversations begin with, and rejects those that begin with something of their own."""
    counts = Counter(reading.systems.values())
    own = [number for number, text in reading.systems.items() if counts[text] == 1 and len(counts) > 1]
    for number in own:
        if number in reading.problems:
            reading.reject(number, "a system turn that no other row has, so it may be part of the question: "
                           f"{reprlib.repr(reading.systems[number])}; put it into the user turn")  # fmt: skip
    if left := len(reading.systems) - len(own):
        [(text, _)] = counts.most_common(1)
        log.info("%s: the system turn of %d rows is left out, since it is no part of one question: %r%s; "
                 "student.instruction says what every prompt says", reading.name, left, text[:SHOWN_CHARS],
                 "..." if len(text) > SHOWN_CHARS else "")  # fmt: skip


def _say_contradictions(reading: _Reading) -> None:
    """Says how many questions have several answers: no row tells which one is right, so all are kept."""
    if len({problem.question for problem in reading.problems.values()}) == len(reading.problems):
        return
    golds: dict[str, set[str]] = {}
    for problem in reading.problems.values():
        golds.setdefault(problem.question, set()).add(problem.answer)
    if torn := [question for question, answers in golds.items() if len(answers) > 1]:
        log.warning("%s: %d questions stand in several rows with different answers, all are kept; the first: %r",
                    reading.name, len(torn), torn[0][:SHOWN_CHARS])  # fmt: skip


def _to_problem(row: Any, columns: Columns, name: str, identifier: str) -> tuple[Problem, NumberKey | None, str | None]:
    """The problem of a row; its key where that is a number, which is no answer yet; its system turn."""
    chat = _chat(row, columns)
    question = chat.question if chat else text_of(value_of(row, columns.question), columns.question)
    options = read_options(value_of(row, columns.choices), columns.choices) if columns.choices else None
    raw, solution = _raw_answer(row, columns, chat)
    key: NumberKey | None = None
    if options is not None:
        found, trace = read_key(raw, options, columns.answer_format)
        key, answer = (found, "") if isinstance(found, NumberKey) else (None, found)
        listing = " ".join(f"{chr(65 + i)}) {text}" for i, text in enumerate(options.texts))
        question = f"{question}\n{listing}\nAnswer with the letter of the right option."
    else:
        if columns.answer_format in ("index", "index1"):
            raise ValueError(f"answer is not the position of an option: {reprlib.repr(raw)}")
        answer, trace = read_gold(raw, columns.answer_format)
        if (hidden := hidden_options(row, answer)) is not None:
            raise ValueError(hidden)
    if columns.trace is not None:
        given = value_of(row, columns.trace)
        turns = chats.turns_in(given)
        trace = chats.answer_in(turns) if turns else text_of(given, columns.trace)
    elif solution is not None and solution != answer:
        trace = solution
    if _any_order(row, columns.any_order):
        answer = as_set(answer)
    if columns.id:
        identifier = as_text(value_of(row, columns.id), f"column {columns.id!r}")
        if not identifier:
            raise ValueError(f"column {columns.id!r} is empty")
    choices = options.texts if options else None
    problem = Problem(
        identifier,
        question,
        answer,
        trace,
        name,
        choices,
        _tolerance(row, columns.tolerance),
        columns.relative_tolerance,
    )
    return problem, key, chat.system if chat else None


def _chat(row: Any, columns: Columns) -> chats.Chat | None:
    """The conversation that a row is, if its question column holds one, or its default columns are not there."""
    if not isinstance(row, dict):
        return None
    turns, is_default = None, columns.question == Columns.question
    has_question, has_answer = has_column(row, columns.question), has_column(row, columns.answer)
    if has_question:
        turns = chats.turns_in(value_of(row, columns.question))
    if turns is None and (not is_default or (has_question and has_answer)):
        return None
    if turns is None:
        turns = next((found for name in chats.COLUMNS if (found := chats.turns_in(row.get(name)))), None)
    return chats.read_chat(turns, row.get("system")) if turns else None


def _raw_answer(row: Any, columns: Columns, chat: chats.Chat | None) -> tuple[Any, str | None]:
    """The value that holds the gold answer, and the solution that a conversation has beside it."""
    if chat is None:
        return value_of(row, columns.answer), None
    if has_column(row, columns.answer):
        given = value_of(row, columns.answer)
        turns = chats.turns_in(given)
        return (chats.answer_in(turns) if turns else given), chat.solution
    if chat.solution is not None and columns.answer == Columns.answer:
        return chat.solution, chat.solution
    if isinstance(row.get("completion"), str | list) and columns.answer == Columns.answer:
        given = row["completion"]
        turns = chats.turns_in(given)
        solution = chats.answer_in(turns) if turns else text_of(given, "completion")
        return solution, solution
    return value_of(row, columns.answer), None


def _any_order(row: Mapping[str, Any], column: bool | str) -> bool:
    value = value_of(row, column) if isinstance(column, str) else column
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # of a CSV file
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"column {column!r} must be true or false, not {reprlib.repr(value)}")
    return value


def _tolerance(row: Mapping[str, Any], column: str | None) -> float:
    value = value_of(row, column) if column else None
    if value is None or value == "":
        return 0.0
    try:
        tolerance = float(as_text(value, "it"))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"column {column!r} must be a number or empty, not {reprlib.repr(value)}") from error
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"column {column!r} must be 0 or more, not {reprlib.repr(value)}")
    return tolerance
