"""Which column of a dataset is what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from slmreason.data.golds import AnswerFormat
from slmreason.data.rows import PLACE

GOLDS = "answer|final_answer|target|result|ground_truth"
SOLUTIONS = "solution|completion|output|response"
"""Columns whose text is a worked solution with the answer in it, read where there is none of the others."""
NAMED = {"answer": "data.columns.answer names the column of the answer, data.columns.answer_format how it stands there"}
"""What an error says of its key, where it says more than that it names a column."""


@contextmanager
def about(key: str) -> Iterator[None]:
    """Adds to an error which key of the config names the column that it is about."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        if "data.columns." in said:
            raise
        joint = "; " if ":" in said else ": "
        raise ValueError(f"{said}{joint}{NAMED.get(key, f'data.columns.{key} names the column')}") from error


@dataclass(frozen=True)
class Columns:
    """Which column of a dataset is what. `a|b` takes the first that is there and not null; `{a} {b}` joins columns into
    a text. What the defaults make of conversations and of Alpaca's rows stands in docs/data.md."""

    question: str = "question|problem|input|prompt"
    """The question's column; it may hold a conversation."""
    answer: str = f"{GOLDS}|{SOLUTIONS}"
    """The column with the gold answer, or with a worked solution that ends in it."""
    trace: str | None = None
    """A worked solution; with `answer_format: hash` or `boxed` the answer column itself serves when this is not set."""
    id: str | None = None
    """A unique id; the row number stands in when this is not set."""
    choices: str | None = None
    """Option texts of a multiple-choice dataset; they are put under the question as `A) ...`."""
    answer_format: AnswerFormat = "auto"
    r"""How the gold stands in its column: `plain`; `hash` (after `####`, GSM8K); `boxed` (in `\boxed{}`, MATH); `index`
    or `index1` (position of the right option, from 0 or from 1); `auto` looks at each value, and at the whole column
    where numbers name options."""
    any_order: bool | str = False
    """Whether a gold answer that is a list counts in any order: for all rows, or by a column with true or false."""
    tolerance: str | None = None
    """The column that says by how much a decimal answer may differ; empty where it may not."""
    relative_tolerance: float = 0.0
    """By what share of the gold number an answer may differ, for all rows: 0.01 is one percent."""

    def __post_init__(self) -> None:
        for each in fields(self):
            column = getattr(self, each.name)
            if isinstance(column, str) and set("{}") & set(PLACE.sub("", column)):
                raise ValueError(
                    f"data.columns.{each.name}: the braces of {column!r} do not pair; a column is {{name}}"
                )
