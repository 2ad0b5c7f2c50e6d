"""Where problems come from: embedded families, JSONL, Parquet, text, or a `datasets` hub name, all to `Problem`.

One rule for bad input. A *row* that cannot become a problem is set aside as a `Reject` with its id, file and line and
the reason, and the run goes on. A *file* that cannot be read to its end, or has no usable row at all, is refused: a
ValueError that names the file and, where known, the line. What slmreason itself wrote, and recorded rollouts, are
refused at the first bad row: a problem whose evidence has a hole would be sorted wrongly, without anybody noticing.

A reason is its kind, a colon, and what is particular to the row.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs

from slmreason.data.files import LOCAL_SUFFIXES, local_rows
from slmreason.embedded.families import DIALS, make_problems
from slmreason.records import Problem, Reject, check_text
from slmreason.verify.answers import last_boxed, list_items, tidy

AnswerFormat = Literal["auto", "plain", "hash", "boxed", "index"]
_PLACE = re.compile(r"\{([^{}]*)\}")
MAX_REASON_CHARS = 500


@dataclass(frozen=True)
class Columns:
    """Which column of a dataset is what. `a|b` takes the first that exists; `{a} {b}` joins columns into a text."""

    question: str = "question|problem|input|prompt"
    """The question's column."""
    answer: str = "answer|final_answer|target|result"
    """The column with the gold answer."""
    trace: str | None = None
    """A worked solution; with `answer_format: hash` or `boxed` the answer column itself serves when this is not set."""
    id: str | None = None
    """A unique id; the row number stands in when this is not set."""
    choices: str | None = None
    """Option texts of a multiple-choice dataset; they are put under the question as `A) ...`."""
    answer_format: AnswerFormat = "auto"
    r"""How the gold stands in its column: `plain`; `hash` (after `####`, GSM8K); `boxed` (in `\boxed{}`, MATH); `index`
    (position of the right option, from 0); `auto` looks at each value."""
    any_order: bool | str = False
    """Whether a gold answer that is a list counts in any order: for all rows, or by a column with true or false."""
    tolerance: str | None = None
    """The column that says by how much a decimal answer may differ; empty where it may not."""

    def __post_init__(self) -> None:
        for each in fields(self):
            column = getattr(self, each.name)
            if isinstance(column, str) and set("{}") & set(_PLACE.sub("", column)):
                raise ValueError(
                    f"data.columns.{each.name}: the braces of {column!r} do not pair; a column is {{name}}"
                )


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset by where it lies and what its columns mean."""

    path: str
    split: str = "test"
    subset: str | None = None
    revision: str | None = None
    columns: Columns = Columns()


KNOWN: dict[str, DatasetSpec] = {
    "openai/gsm8k": DatasetSpec("openai/gsm8k", "train", "main", columns=Columns(answer_format="hash")),
    "gsm8k": DatasetSpec("openai/gsm8k", "test", "main", columns=Columns(answer_format="hash")),
    "gsm8k_platinum": DatasetSpec("madrylab/gsm8k-platinum", "test", "main", columns=Columns(answer_format="hash")),
    "svamp": DatasetSpec("ChilleD/SVAMP", columns=Columns(question="{Body} {Question}", answer="Answer", id="ID")),
    "mawps": DatasetSpec("MU-NLPC/Calc-mawps", columns=Columns(question="question|input", answer="result|target")),
    "math500": DatasetSpec(
        "HuggingFaceH4/MATH-500",
        # Its lists are roots and solutions ("enter them separated by commas"); points and triples stand in brackets.
        columns=Columns(question="problem", trace="solution", id="unique_id", any_order=True),
    ),
    "amc23": DatasetSpec("math-ai/amc23", columns=Columns(question="question|problem")),
    "aime24": DatasetSpec("math-ai/aime24", columns=Columns(question="problem|question", answer="answer|solution")),
    "minerva": DatasetSpec("math-ai/minervamath", columns=Columns(answer="answer|solution")),
    "olympiadbench": DatasetSpec(
        "math-ai/olympiadbench",
        columns=Columns(answer="final_answer", any_order="is_multiple_answer", tolerance="error"),
    ),
    "logiqa": DatasetSpec(
        "lucasmccabe/logiqa",
        revision="refs/convert/parquet",
        columns=Columns(
            question="{context} {query}", answer="correct_option", choices="options", answer_format="index"
        ),
    ),
}
"""Datasets with a name of their own. `name=path` reads a local file; where its columns differ both are named."""


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


def most_common(rejects: Sequence[Reject]) -> str:
    """The three commonest kinds of reason, with how often and where first: `not JSON (3, first a.jsonl, line 7)`."""
    kinds = [reject.reason.partition(":")[0] for reject in rejects]
    shown = [
        f"{kind} ({count}, first {rejects[kinds.index(kind)].where})" for kind, count in Counter(kinds).most_common(3)
    ]
    return "; ".join([*shown, "..."] if len(set(kinds)) > 3 else shown)


def load_problems(
    source: str, columns: Columns | None = None, split: str | None = None, limit: int | None = None
) -> Loaded:
    """Reads a source.

    Args:
        source: `embedded:FAMILY/SPLIT?count=N&difficulty=1,2`, a file (.jsonl, .json, .parquet, .gz), a `KNOWN` name,
            `NAME=FILE` for a known dataset in a local file (`logiqa=Test.txt` too), or any hub name.
        columns: overrides the known dataset's.
        split: overrides the known dataset's.
        limit: reads no more than so many rows.

    Raises:
        ValueError: the source does not exist, cannot be read to its end, or gives no problem; the message names it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{source}: a limit of {limit} rows leaves no problem; it must be at least 1")
    name, _, path = source.partition("=") if not source.startswith("embedded:") else (source, "", "")
    if source.startswith("embedded:"):
        return Loaded(source, tuple(_embedded(source)[:limit]))
    spec = KNOWN.get(name, DatasetSpec(name, split="train"))
    spec = replace(spec, path=path or spec.path, columns=columns or spec.columns, split=split or spec.split)
    rows = local_rows(Path(spec.path)) if _is_file_name(spec.path) else _hub_rows(spec)
    loaded = _to_problems(rows, spec.columns, name, limit)
    if not loaded.problems:
        first = loaded.rejects[0] if loaded.rejects else None
        seen = f"; all {len(loaded.rejects)} rows are bad, the first in {first.where}: {first.reason}" if first else ""
        raise ValueError(f"{source}: no usable problem{seen}")
    return loaded


def _is_file_name(path: str) -> bool:
    return path.endswith(LOCAL_SUFFIXES) or os.path.isfile(path)


def _embedded(source: str) -> list[Problem]:
    place, _, query = source.removeprefix("embedded:").partition("?")
    family, _, split = place.partition("/")
    options = parse_qs(query)
    unknown = sorted(set(options) - {"count", "difficulty"})
    if unknown:
        raise ValueError(f"{source}: unknown options {unknown}; there are count and difficulty")
    try:
        count = int(options.get("count", ["200"])[0])
        dial = tuple(int(d) for d in options["difficulty"][0].split(",")) if "difficulty" in options else None
    except ValueError as error:
        raise ValueError(f"{source}: count and difficulty take whole numbers ({error})") from error
    if family not in DIALS:
        raise ValueError(f"{source}: families are {', '.join(sorted(DIALS))}")
    if count < 1:
        raise ValueError(f"{source}: count must be at least 1")
    return make_problems(family, split or "train", count, dial)


def _hub_rows(spec: DatasetSpec) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        table = datasets.load_dataset(spec.path, spec.subset, split=spec.split, revision=spec.revision)
    except Exception as error:  # the hub client raises many kinds; each means: this dataset cannot be had
        known = ", ".join(sorted(KNOWN))
        raise ValueError(
            f"{spec.path}: neither a local file nor a dataset that the hub gave ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); known names: {known}"
        ) from error
    for number, row in enumerate(table):
        yield f"{spec.path}/{spec.split}, row {number}", row


def _to_problems(rows: Iterator[tuple[str, Any]], columns: Columns, name: str, limit: int | None) -> Loaded:
    problems: list[Problem] = []
    rejects: list[Reject] = []
    places: dict[str, str] = {}
    for number, (where, row) in enumerate(rows):
        if limit is not None and number >= limit:
            break
        identifier = f"{name}-{number:06d}"
        try:
            problem = _to_problem(row, columns, name, identifier)
            if problem.id in places:
                identifier = problem.id
                raise ValueError(f"the id stands twice: {places[problem.id]} has it too, and is kept")
        except ValueError as error:
            rejects.append(Reject(identifier, where, str(error)[:MAX_REASON_CHARS]))
        else:
            places[problem.id] = where
            problems.append(problem)
    return Loaded(name, tuple(problems), tuple(rejects), places)


def _to_problem(row: Any, columns: Columns, name: str, identifier: str) -> Problem:
    question = _text(row, columns.question)
    raw_answer = value_of(row, columns.answer)
    choices = _choices(row, columns.choices)
    answer, trace = read_answer(raw_answer, columns.answer_format, choices)
    if columns.trace is not None:
        trace = _text(row, columns.trace)
    if _any_order(row, columns.any_order):
        answer = as_set(answer)
    if choices:
        listing = " ".join(f"{chr(65 + i)}) {text}" for i, text in enumerate(choices))
        question = f"{question}\n{listing}\nAnswer with the letter of the right option."
    if columns.id:
        identifier = as_text(value_of(row, columns.id), f"column {columns.id!r}")
        if not identifier:
            raise ValueError(f"column {columns.id!r} is empty")
    return Problem(identifier, question, answer, trace, name, choices, _tolerance(row, columns.tolerance))


def read_answer(value: Any, answer_format: AnswerFormat, choices: tuple[str, ...] | None) -> tuple[str, str | None]:
    r"""The gold answer and, where the column holds a whole solution, that solution.

    Raises:
        ValueError: the value is empty or not in the format asked for.
    """
    if answer_format == "index":
        if choices is None or type(value) is not int or not 0 <= value < len(choices):
            raise ValueError(f"answer is not the position of an option: {reprlib.repr(value)}")
        return chr(65 + value), None
    text = ", ".join(as_text(v, "answer") for v in (value if isinstance(value, list | tuple) else (value,)))
    boxed = last_boxed(text)
    if answer_format == "hash" or (answer_format == "auto" and "####" in text):
        answer, trace = text.rpartition("####")[2], text
        if "####" not in text:
            raise ValueError("no `####` in the answer")
    elif answer_format == "boxed" or (answer_format == "auto" and boxed is not None):
        if boxed is None:
            raise ValueError(r"no \boxed{} in the answer")
        answer, trace = boxed, text
    else:
        answer, trace = text, None  # type: ignore[assignment]
    if not answer.strip():
        raise ValueError("empty answer")
    return answer.strip(), trace


def as_set(answer: str) -> str:
    r"""A gold list `2, 3` as the set `\{2, 3\}`, which the verifier compares in any order; all else as it is."""
    items = [tidy(item) for item in list_items(tidy(answer))]
    return f"\\{{{', '.join(items)}\\}}" if len(items) > 1 else answer


def _any_order(row: Mapping[str, Any], column: bool | str) -> bool:
    value = value_of(row, column) if isinstance(column, str) else column
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


def _choices(row: Mapping[str, Any], column: str | None) -> tuple[str, ...] | None:
    if column is None:
        return None
    value = value_of(row, column)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"column {column!r} must be a list of option texts")
    return tuple(as_text(v, f"column {column!r}") for v in value)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = value_of(row, column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be a text: it is {_kind(value)}")
    if not value.strip():
        raise ValueError(f"column {column!r} is empty")
    return as_text(value, f"column {column!r}").strip()


def as_text(value: Any, what: str) -> str:
    """A text as it is, or a finite number as text, 7.0 as `7`.

    Raises:
        ValueError: the value is neither, or holds half a character; the message names `what` it is.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{what} must be a text or a number: it is {_kind(value)}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{what} must be finite: it is {value}")
        value = int(value) if value.is_integer() else value
    check_text(text := str(value), what)
    return text


_KINDS: dict[type, str] = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"
}  # fmt: skip


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def value_of(row: Any, column: str) -> Any:
    """The value of a column: `a|b` takes the first that exists, `{a} {b}` joins columns into a text.

    Raises:
        ValueError: the row is not an object or has no such column; the message names those it has.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be an object: it is {_kind(row)}")
    if "{" in column:
        names = {name: as_text(value_of(row, name), f"column {name!r}") for name in _PLACE.findall(column)}
        return _PLACE.sub(lambda match: names[match.group(1)], column).strip()
    for option in column.split("|"):
        if option in row:
            return row[option]
    raise ValueError(f"no column {column!r}: there are {sorted(map(str, row))}")
