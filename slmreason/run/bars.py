"""The bars of a terminal: one display, in which each work that is under way has a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from slmreason.runtime.distributed import is_first

Draw = Callable[[float, str], None]
"""Takes the share that is done, from 0 to 1, and what is said beside the bar."""
REFRESHED = 4
"""Times a second that the display is drawn."""
_display: Progress | None = None
_is_hidden = False
"""The terminal is another bar's."""


class SaidColumn(ProgressColumn):
    """What is said beside a bar: where the terminal is narrow its end is cut off, and never the label."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        return Text(task.fields["said"], no_wrap=True, overflow="ellipsis")


def screen() -> Console:
    """The console for bars: that of the log, since two would write over each other. It is quiet but in one process."""
    return get_console() if is_first() else Console(quiet=True)


def are_shown() -> bool:
    """Whether there is a display now."""
    return _display is not None


@contextmanager
def bars(console: Console, wanted: bool = True) -> Iterator[None]:
    """Within it rows are shown, if `console` is a terminal. Where there is a display already, that one goes on."""
    global _display
    if _display is not None or _is_hidden or not wanted or console.quiet or not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), SaidColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=REFRESHED) as display:
        _display = display
        try:
            yield
        finally:
            _display = None


@contextmanager
def row(label: str, console: Console, wanted: bool = True) -> Iterator[Draw]:
    """A row of the display, which is opened for it where there is none. What it gives draws nothing elsewhere."""
    with bars(console, wanted):
        display = _display
        if display is None:
            yield lambda share, said: None
            return
        task = display.add_task(label, total=1.0, said="")
        try:
            yield lambda share, said: display.update(task, completed=share, said=said)
        finally:
            display.remove_task(task)


@contextmanager
def hidden(wanted: bool = True) -> Iterator[None]:
    """Within it the display makes way for a bar that is not ours, if that is wanted: a terminal holds only one."""
    global _display, _is_hidden
    if not wanted:
        yield
        return
    display, _display, _is_hidden = _display, None, True
    if display is not None:
        display.stop()
    try:
        yield
    finally:
        if display is not None:
            display.start()
        _display, _is_hidden = display, False
