"""The display of a terminal: its rows, what a narrow one shows, and how it makes way."""

from __future__ import annotations

import io
import re

from rich.console import Console

from slmreason.run import bars as module
from slmreason.run.bars import are_shown, bars, hidden, row


def terminal(width: int = 80) -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, force_terminal=True, width=width, color_system=None, legacy_windows=False), screen


def redraw() -> None:
    """At once: it is drawn a few times a second."""
    assert module._display is not None
    module._display.refresh()


def lines(screen: io.StringIO) -> list[str]:
    """Everything that was ever drawn, a line each, without what moves the cursor."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", screen.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_rows_stand_in_one_display_and_go_with_their_work() -> None:
    console, screen = terminal()
    with bars(console), row("run", console) as whole:
        whole(0.5, "stage 1 of 2")
        redraw()
        with row("probe", console) as draw:
            draw(0.25, "3 of 12 completions")
            redraw()
            with bars(console):  # one that is opened within another is the same
                pass
            assert are_shown()
        first = len(screen.getvalue())
        whole(0.75, "stage 2 of 2")
        redraw()
    assert not are_shown()
    drawn = lines(screen)
    assert any(line.startswith("run ") and line.endswith("stage 1 of 2") for line in drawn)
    assert any(line.startswith("probe ") and line.endswith("3 of 12 completions") for line in drawn)
    assert "probe" not in screen.getvalue()[first:]


def test_a_narrow_terminal_cuts_off_the_end_of_what_is_said_and_no_label() -> None:
    console, screen = terminal(width=60)
    with row("round 1 sft re-measure", console) as draw:
        draw(0.5, "2 min left, 120 of 1,000 completions, 340 tokens/s, rho 0.25 of 120")
        redraw()
    shown = [line for line in lines(screen) if "2 min left" in line]
    assert shown
    assert all(line.startswith("round 1 sft re-measure") and len(line) <= 60 for line in shown)
    assert all(line.endswith("…") for line in shown)


def test_nothing_is_drawn_where_there_is_no_terminal_or_nobody_wants_it() -> None:
    piped = io.StringIO()
    with row("x", Console(file=piped)) as draw:
        draw(0.5, "half")
        assert not are_shown()
    assert piped.getvalue() == ""
    console, screen = terminal()
    with row("x", console, wanted=False) as draw:
        draw(0.5, "half")
    assert screen.getvalue() == ""


def test_the_display_makes_way_for_another_bar_and_comes_back() -> None:
    console, screen = terminal()
    with bars(console), row("run", console) as whole:
        with hidden():
            before = screen.getvalue()
            whole(0.5, "stage 1 of 2")
            with row("probe", console) as draw:  # within it no other display is opened either
                draw(0.5, "half")
            assert not are_shown()
            assert screen.getvalue() == before
        assert are_shown()
        with hidden(wanted=False):
            assert are_shown()
    assert lines(screen)[-1].endswith("stage 1 of 2")
    with hidden():  # where there was none, none comes
        pass
    assert not are_shown()
