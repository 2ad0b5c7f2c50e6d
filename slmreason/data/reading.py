"""Rows to problems: what each row says by itself, and what only the whole of a source can tell.

A row that cannot become a problem is rejected, with its id, file and line and the reason.
"""

from __future__ import annotations

import logging
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slmreason.data import chats
from slmreason.data.asked import read_asked
from slmreason.data.choices import (
    NumberKey,
    Options,
    hidden_options,
    letter_of,
    numbering,
    read_key,
    read_options,
)
from slmreason.data.columns import GOLDS, NAMED, SOLUTIONS, Columns, about
from slmreason.data.golds import as_set, read_gold, unmatched
from slmreason.data.rows import as_text, check_row, has_column, text_of, value_of
from slmreason.records import Problem, Reject
from slmreason.verify.functions import storable

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
        """Rejects the problems that a reason is given against, by id."""
        rejected = [problem for problem in self.problems if problem.id in reasons]
        rejects = [Reject(p.id, self.places.get(p.id, self.name), reasons[p.id]) for p in rejected]
        kept = tuple(problem for problem in self.problems if problem.id not in reasons)
        return replace(self, problems=kept, rejects=(*self.rejects, *rejects))

    def within(self, prompt_length: Callable[[Problem], int], limit: int, why: str) -> Loaded:
        """Rejects the problems whose prompt has more than `limit` tokens.

        Args:
            prompt_length: problem -> number of prompt tokens under the student's template.
            why: what sets the limit.
        """
        lengths = {p.id: prompt_length(p) for p in self.problems}
        return self.without({
            i: f"prompt too long: {length} tokens, {why}" for i, length in lengths.items() if length > limit
        })  # fmt: skip


@dataclass
class _Reading:
    """What has been read of a source, and what only the whole of it can tell."""

    name: str
    columns: Columns
    wants: Callable[[str], bool] | None = None
    """Which columns a problem keeps besides."""
    problems: dict[int, Problem] = field(default_factory=dict)
    """By the number of the row."""
    rejects: dict[int, Reject] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    keys: dict[int, NumberKey] = field(default_factory=dict)
    """Numbers that name options: what they mean says their column."""

    def add(self, number: int, location: str, row: Any) -> None:
        """Reads a row; one that cannot become a problem is rejected."""
        identifier = f"{self.name}-{number:06d}"
        try:
            problem, key = _to_problem(row, self.columns, self.name, identifier)
            if problem.id in self.places:
                identifier = problem.id
                raise ValueError(f"the id stands twice: {self.places[problem.id]} has it too, and is kept")
        except ValueError as error:
            self.rejects[number] = Reject(identifier, location, str(error)[:MAX_REASON_CHARS])
            return
        if self.wants is not None and (kept := {str(name): storable(row[name]) for name in filter(self.wants, row)}):
            problem = replace(problem, columns=kept)
        self.places[problem.id], self.problems[number] = location, problem
        if key is not None:
            self.keys[number] = key

    def reject(self, number: int, reason: str) -> None:
        """Rejects a row that was read."""
        problem = self.problems.pop(number)
        self.rejects[number] = Reject(problem.id, self.places.pop(problem.id), reason[:MAX_REASON_CHARS])

    def loaded(self) -> Loaded:
        rejects = tuple(self.rejects[number] for number in sorted(self.rejects))
        return Loaded(self.name, tuple(self.problems.values()), rejects, self.places)


def to_problems(
    rows: Iterator[tuple[str, Any]],
    columns: Columns,
    name: str,
    limit: int | None,
    wants: Callable[[str], bool] | None = None,
) -> Loaded:
    reading = _Reading(name, columns, wants)
    beyond: list[NumberKey] = []
    for number, (location, row) in enumerate(rows):
        if limit is None or number < limit:
            reading.add(number, location, row)
        elif reading.keys:  # what the numbers mean says the whole column
            beyond += _number_key(row, columns)
        else:
            break
    _settle_keys(reading, beyond)
    never = unmatched(list(reading.problems.values()))
    for number, problem in list(reading.problems.items()) if never else []:
        if problem.id in never:
            reading.reject(number, f"{never[problem.id]}; {NAMED['answer']}")
    _say_contradictions(reading)
    return reading.loaded()


def _number_key(row: Any, columns: Columns) -> list[NumberKey]:
    try:
        _, key = _to_problem(row, columns, "", "beyond the limit")
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
            reading.reject(number, f"{error}; data.columns.answer_format says how they count")


def _say_contradictions(reading: _Reading) -> None:
    """Says how many questions have several answers: no row tells which one is right, so all are kept."""
    if len({problem.whole_question for problem in reading.problems.values()}) == len(reading.problems):
        return
    golds: dict[str, set[str]] = {}
    for problem in reading.problems.values():
        golds.setdefault(problem.whole_question, set()).add(problem.answer)
    if torn := [question for question, answers in golds.items() if len(answers) > 1]:
        log.warning("%s: %d questions stand in several rows with different answers, all are kept; the first: %r",
                    reading.name, len(torn), torn[0][:SHOWN_CHARS])  # fmt: skip


def _to_problem(row: Any, columns: Columns, name: str, identifier: str) -> tuple[Problem, NumberKey | None]:
    """The problem of a row, and its key where that is a number, which is no answer yet.

    Raises:
        ValueError: the row cannot become a problem; the message says why, and which key of the config names the column.
    """
    check_row(row)
    with about("question"):
        asked = read_asked(row, columns)
    options = None
    if columns.choices:
        with about("choices"):
            options = read_options(value_of(row, columns.choices), columns.choices)
    with about("answer"):
        answer, key, trace = _answer(row, columns, asked, options)
    if columns.trace is not None:
        with about("trace"):
            trace = _given_trace(row, columns.trace)
    with about("any_order"):
        answer = as_set(answer) if _any_order(row, columns.any_order) else answer
    if columns.id:
        with about("id"):
            identifier = _given_id(row, columns.id)
    with about("tolerance"):
        tolerance = _tolerance(row, columns.tolerance)
    problem = Problem(
        id=identifier,
        question=asked.question if options is None else _with_listing(asked.question, options),
        answer=answer,
        trace=trace,
        source=name,
        choices=options.texts if options else None,
        tolerance=tolerance,
        relative_tolerance=columns.relative_tolerance,
        turns=asked.turns,
    )
    return problem, key


def _with_listing(question: str, options: Options) -> str:
    listing = " ".join(f"{chr(65 + i)}) {text}" for i, text in enumerate(options.texts))
    return f"{question}\n{listing}\nAnswer with the letter of the right option."


# -- what is right --------------------------------------------------------------------------------------------------


def _answer(
    row: Mapping[str, Any], columns: Columns, asked: chats.Chat, options: Options | None
) -> tuple[str, NumberKey | None, str | None]:
    """(the gold, the key where it is a number yet, the worked solution around it or beside it)."""
    raw, solution = _raw_answer(row, columns, asked)
    key: NumberKey | None = None
    if options is not None:
        found, trace = read_key(raw, options, columns.answer_format)
        key, answer = (found, "") if isinstance(found, NumberKey) else (None, found)
    else:
        if columns.answer_format in ("index", "index1"):
            raise ValueError(f"answer is not the position of an option: {reprlib.repr(raw)}")
        answer, trace = read_gold(raw, columns.answer_format)
        if (hidden := hidden_options(row, answer)) is not None:
            raise ValueError(hidden)
    if solution is not None and solution.strip() != answer:
        trace = solution.strip()
    return answer, key, trace


def _raw_answer(row: Mapping[str, Any], columns: Columns, asked: chats.Chat) -> tuple[Any, str | None]:
    """The value that holds the gold answer, and the solution that stands beside it or is it."""
    is_default = columns.answer == Columns.answer
    if is_default and not has_column(row, GOLDS):
        if asked.solution is not None:
            return asked.solution, asked.solution
        if has_column(row, SOLUTIONS):
            solution = _said_last(value_of(row, SOLUTIONS))
            return solution, solution if isinstance(solution, str) else None
    return _said_last(value_of(row, columns.answer)), asked.solution


def _said_last(value: Any) -> Any:
    """What the assistant says last where a value is a conversation; any other value as it is."""
    turns = chats.turns_in(value)
    return chats.answer_in(turns) if turns else value


def _given_trace(row: Mapping[str, Any], column: str) -> str:
    return text_of(_said_last(value_of(row, column)), column)


def _given_id(row: Mapping[str, Any], column: str) -> str:
    identifier = as_text(value_of(row, column), f"column {column!r}")
    if not identifier:
        raise ValueError(f"column {column!r} is empty")
    return identifier


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
