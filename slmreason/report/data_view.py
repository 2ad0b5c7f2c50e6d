"""How a data set is read: its first rows with their prompts, what it holds, and what is rejected and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from slmreason.data.reading import Loaded
from slmreason.records import Problem, Reject
from slmreason.student import Student

MAX_SHOWN_CHARS = 2000
"""Of a text in the view; a prompt is shown whole."""
_KEY = re.compile(r"data\.(?:columns\.)?[a-z_]+")


@dataclass(frozen=True)
class RowView:
    """A row as a problem, and the tokens that the student gets of it."""

    location: str
    problem: Problem
    prompt: str
    """With every special token."""
    prompt_tokens: int
    trace_tokens: int | None
    """Of the trace as a target; None where the row has none."""


@dataclass(frozen=True)
class RejectKind:
    """Rows that are rejected for one kind of reason."""

    count: int
    first: Reject

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the config that the reason names."""
        return tuple(dict.fromkeys(_KEY.findall(self.first.reason)))


@dataclass(frozen=True)
class DataView:
    """What is shown of a data set."""

    name: str
    rows: tuple[RowView, ...]
    num_problems: int
    rejects: tuple[RejectKind, ...]
    """The commonest first."""
    prompt_tokens: tuple[int, ...]
    """Of each problem."""
    trace_tokens: tuple[int, ...]
    """Of each problem that brings a trace."""

    @property
    def num_rejected(self) -> int:
        return sum(kind.count for kind in self.rejects)


def data_view(name: str, loaded: Loaded, student: Student, num_rows: int) -> DataView:
    """What there is to show of a data set.

    Args:
        name: what it is called.
        num_rows: rows that are shown whole.
    """
    traces = [student.encode_target(p.trace) for p in loaded.problems if p.trace is not None]
    return DataView(
        name=name,
        rows=tuple(_row(problem, loaded, student) for problem in loaded.problems[:num_rows]),
        num_problems=len(loaded.problems),
        rejects=_kinds(loaded.rejects),
        prompt_tokens=tuple(student.prompt_length(problem) for problem in loaded.problems),
        trace_tokens=tuple(map(len, traces)),
    )


def _row(problem: Problem, loaded: Loaded, student: Student) -> RowView:
    prompt = list(student.encode_problem(problem))
    return RowView(
        location=loaded.places.get(problem.id, loaded.name),
        problem=problem,
        prompt=str(student.tokenizer.decode(prompt)),
        prompt_tokens=len(prompt),
        trace_tokens=None if problem.trace is None else len(student.encode_target(problem.trace)),
    )


def _kinds(rejects: Sequence[Reject]) -> tuple[RejectKind, ...]:
    by_kind: dict[str, list[Reject]] = {}
    for reject in rejects:
        by_kind.setdefault(reject.fault.kind, []).append(reject)
    kinds = [RejectKind(len(mine), mine[0]) for mine in by_kind.values()]
    return tuple(sorted(kinds, key=lambda kind: -kind.count))


def lines(view: DataView) -> Iterator[str]:
    """The view as lines of text; a prompt stands on lines of its own, as it is."""
    for row in view.rows:
        yield from _row_lines(row)
    total = view.num_problems + view.num_rejected
    yield f"{view.name}: {view.num_problems} of {total} rows are problems, {view.num_rejected} are rejected"
    yield f"prompts: {_spread(view.prompt_tokens)}"
    if view.trace_tokens:
        count = len(view.trace_tokens)
        yield f"traces: {count} of {view.num_problems} problems bring one; {_spread(view.trace_tokens)}"
    else:
        yield "traces: no problem brings one; data.columns.trace names the column of worked solutions"
    for kind in view.rejects:
        yield f"rejected {kind.count}, the first in {kind.first.where}: {kind.first.reason}"
        if kind.keys:
            yield f"    keys to set: {', '.join(kind.keys)}"


def _row_lines(row: RowView) -> Iterator[str]:
    problem = row.problem
    yield f"-- {row.location} (id {problem.id})"
    for turn in problem.turns:
        yield f"{turn.role} before: {_cut(turn.text)}"
    yield f"question: {_cut(problem.question)}"
    yield f"gold: {_cut(problem.answer)}"
    yield "trace: none" if problem.trace is None else f"trace, {row.trace_tokens} tokens: {_cut(problem.trace)}"
    yield f"prompt, {row.prompt_tokens} tokens:"
    yield row.prompt
    yield ""


def _spread(tokens: Sequence[int]) -> str:
    if not tokens:
        return "none"
    return f"{median(tokens):.0f} tokens at the median, {max(tokens)} at most"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}... ({len(text)} characters)"
