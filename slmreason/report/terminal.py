"""Tables on the screen: whole where the output is a file or a pipe, in parts that fit where the terminal is narrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

UNBOUNDED = 100_000
"""Characters of a line that no table needs."""


def print_tables(console: Console, *tables: Table) -> None:
    """Prints tables, so that no cell is cut off.

    A terminal that is too narrow gets the columns in several tables, each with the first column again. What is piped or
    written to a file has no width: there lines are as long as the table.
    """
    for table in tables:
        for part in parts(console, table, console.width) if console.is_terminal else [copy(table)]:
            needed, title = natural_width(console, part), part.title
            if title and cell_len(str(title)) > needed:  # within the table it would be broken
                console.print(title, style="table.title", soft_wrap=not console.is_terminal)
                part.title = None
            with _width(console, console.width if console.is_terminal else max(console.width, needed)):
                console.print(part)


@contextmanager
def _width(console: Console, width: int) -> Iterator[None]:
    before, console.width = console.width, width
    try:
        yield
    finally:
        console.width = before


def parts(console: Console, table: Table, width: int) -> list[Table]:
    """The table in as many as it takes for each to be at most `width` wide; the first column stands in each."""
    if not table.columns:
        return []
    first, *rest = table.columns
    groups: list[list[Column]] = [[]]
    for column in rest:
        wider = _with_columns(table, [first, *groups[-1], column])
        if groups[-1] and natural_width(console, wider) > width:
            groups.append([])
        groups[-1].append(column)
    found = [_with_columns(table, [first, *group]) for group in groups]
    for later in found[1:]:
        later.title = None
    return found


def natural_width(console: Console, table: Table) -> int:
    """How wide a table is where nothing is wrapped or cut off; its title is not counted."""
    plain = copy(table)
    plain.title = plain.caption = None
    options = console.options.update(width=UNBOUNDED)
    return Measurement.get(console, options, plain).maximum


def _with_columns(table: Table, columns: Sequence[Column]) -> Table:
    chosen = copy(table)
    chosen.columns = [replace(column, _index=index) for index, column in enumerate(columns)]
    return chosen
