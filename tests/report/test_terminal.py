"""Tables where the terminal is narrow, and where there is none."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from slmreason.evaluate.benchmarks import Score, scores_table
from slmreason.report.terminal import print_tables

NAMES = ["chain", "one_step", "distractor", "expression", "logic", "gsm8k_platinum", "minerva", "olympiadbench"]
LABELS = ["base", "round 1 sft", "round 1 grpo"]


def drawn(width: int, names: list[str], terminal: bool) -> str:
    """What is printed of a table of accuracies, each of which is another."""
    rows = [
        (label, [Score(name, "pass@1", (10 * r + c) / 100, 0, 1, 300) for c, name in enumerate(names)])
        for r, label in enumerate(LABELS, start=1)
    ]
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_tables(console, scores_table("greedy pass@1 in %, 95 % interval", rows))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [30, 40, 80, 200])
def test_a_narrow_terminal_gets_every_cell_in_several_tables(width: int) -> None:
    text = drawn(width, NAMES, terminal=True)
    assert "\u2026" not in text
    for name in NAMES:
        assert text.count(f" {name} ") + text.count(f" {name}\n") == 1
    for row in range(1, len(LABELS) + 1):
        assert all(f"{10 * row + column}.0 0-100" in text for column in range(len(NAMES)))
    assert max(map(len, text.splitlines())) <= max(width, len("greedy pass@1 in %, 95 % interval"))
    assert len(set(map(text.count, LABELS))) == 1  # the labels stand in each part


def test_what_is_piped_is_one_table_however_wide() -> None:
    text = drawn(80, NAMES, terminal=False)
    assert text.count("base") == 1
    assert "\u2026" not in text
    assert all(f"3{column}.0 0-100" in text for column in range(len(NAMES)))


def test_a_title_is_printed_in_words_however_narrow_the_table_is() -> None:
    assert "greedy pass@1 in %, 95 % interval" in drawn(80, ["a"], terminal=True)
    assert "greedy pass@1 in %, 95 % interval" in drawn(80, ["a"], terminal=False)
