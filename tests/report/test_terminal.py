"""Tables where the terminal is narrow, and where there is none."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from slmreason.embedded.families import make_problems
from slmreason.evaluate.benchmarks import Score
from slmreason.evaluate.bootstrap import Estimate
from slmreason.evaluate.compare import ArmResult
from slmreason.records import BridgeCandidate, BridgeResult, Fault, Learnability, Trace
from slmreason.report.terminal import arms_tables, bridge_table, print_tables, samples_table, scores_table

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


def test_table_has_a_row_for_each_label() -> None:
    table = scores_table(
        "t", [("base", [Score("a", "pass@1", 0.5, 0.4, 0.6, 10)]), ("end", [Score("a", "pass@1", 1, 0.9, 1, 10)])]
    )
    assert table.row_count == 2
    assert [column.header for column in table.columns][-1] == "mean"


def test_the_comparison_has_a_table_over_all_benchmarks_and_one_by_benchmark() -> None:
    sure = Estimate(0.5, 0.4, 0.6)
    arms = [
        ArmResult("ours", (0,), sure, {"x": sure, "y": sure}, None, 1e6, 9),
        ArmResult("base", (0,), sure, {"x": sure, "y": sure}, sure, 1e6, 9),
    ]
    over_all, each = arms_tables(arms, "title")
    assert [str(column.header) for column in over_all.columns] == ["arm", "mean", "ours ahead by", "M tokens", "s"]
    assert [str(column.header) for column in each.columns] == ["arm", "x", "y"]
    assert list(over_all.columns[2].cells) == ["", "+50.0 [+40.0, +60.0]"]


def test_samples_have_a_row_for_each_benchmark_and_a_column_for_each_metric() -> None:
    scores = [Score("a", metric, 0.5, 0.4, 0.6, 10) for metric in ("pass@1", "maj@4")]
    table = samples_table("qwen", 4, {"a": 10}, scores)
    assert [str(column.header) for column in table.columns] == ["benchmark", "problems", "pass@1", "maj@4"]
    assert [list(column.cells)[0] for column in table.columns[:2]] == ["a", "10"]


def test_the_table_says_under_each_heading_what_it_names() -> None:
    problem = make_problems("chain", "train", 1)[0]

    def candidate(kind: Any, fault: Fault | None) -> BridgeCandidate:
        return BridgeCandidate(Trace(problem.id, kind, kind, Learnability(4.0, 0.5, 9)), fault)

    raw, bridged = candidate("teacher", Fault("too long", "9 tokens, the cap is 8")), candidate("bridged", None)
    table = bridge_table([BridgeResult(problem, (raw, bridged), bridged.trace)])
    shown = {str(column.header): list(column.cells) for column in table.columns}
    assert shown == {
        "candidate": ["teacher", "bridged"], "proposed": ["1", "1"], "chosen": ["0", "1"], "rejected": ["1", "0"],
        "RSR": ["-", "4.00"], "nats/token": ["-", "0.50"], "most for": ["too long 1", ""],
    }  # fmt: skip
