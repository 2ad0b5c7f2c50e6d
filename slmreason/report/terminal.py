"""Every table of the terminal, and how one is printed.

It is whole where the output is a file or a pipe, and in parts that fit where the terminal is narrow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from statistics import median
from typing import get_args

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from slmreason.data.ledger import Ledger
from slmreason.data.strata import Strata
from slmreason.evaluate.benchmarks import Score
from slmreason.evaluate.compare import ArmResult
from slmreason.evaluate.curves import Curves, Lead
from slmreason.records import BAND_NAMES, BridgeResult, Critique, Provenance
from slmreason.runtime.redact import cell

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


# -- what they show -------------------------------------------------------------------------------------------------


def scores_table(title: str, rows: Sequence[tuple[str, Sequence[Score]]], with_mean: bool = True) -> Table:
    """A table with a row for each (label, scores) and a column for each benchmark and metric."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    first = next((scores for _, scores in rows if scores), [])
    one_metric = len({score.metric for score in first}) == 1
    for score in first:
        heading = score.benchmark if one_metric else f"{score.benchmark} {score.metric}"
        table.add_column(f"{cell(heading)}\nn={score.problems}", justify="right", no_wrap=True)
    if with_mean and one_metric:
        table.add_column("mean", justify="right")
    for label, scores in rows:
        cells = [str(score) for score in scores]
        if with_mean and one_metric and scores:
            cells.append(f"{100 * sum(score.value for score in scores) / len(scores):.1f}")
        table.add_row(cell(label), *cells)
    return table


def samples_table(model: str, samples: int, problems: Mapping[str, int], scores: Sequence[Score]) -> Table:
    """A row for each benchmark, a column for each metric.

    Args:
        samples: answers to each problem.
        problems: benchmark -> how many problems it has.
    """
    metrics = list(dict.fromkeys(score.metric for score in scores))
    table = Table(title=f"{cell(model)}: {samples} samples a problem, 95 % interval")
    for heading in ("benchmark", "problems", *metrics):
        table.add_column(heading, justify="left" if heading == "benchmark" else "right")
    for name, count in problems.items():
        mine = {score.metric: score for score in scores if score.benchmark == name}
        table.add_row(cell(name), str(count), *(str(mine[metric]) for metric in metrics))
    return table


def arms_tables(results: Sequence[ArmResult], title: str) -> list[Table]:
    """The comparison for the terminal: over all benchmarks, then by benchmark."""
    names = list(results[0].benchmarks)
    over_all = [
        (result.arm, str(result.mean), result.ahead.signed() if result.ahead else "", f"{result.tokens / 1e6:.2f}",
         f"{result.seconds:.0f}")
        for result in results
    ]  # fmt: skip
    each = [(r.arm, *(f"{100 * estimate.mean:.1f}" for estimate in r.benchmarks.values())) for r in results]
    return [
        plain_table(title, ["arm", "mean", f"{results[0].arm} ahead by", "M tokens", "s"], over_all),
        plain_table("by benchmark", ["arm", *names], each),
    ]


def curves_tables(curves: Sequence[Curves]) -> list[Table]:
    """The curves for the terminal: accuracy at each budget, the first arm's lead, and that by benchmark in short."""
    if not curves:
        return []
    over_all, *each = curves
    first = over_all.arms[0].arm
    heads = [tokens_text(budget) for budget in over_all.budgets]
    heights = [(arm.arm, *map(str, arm.accuracy), str(arm.area)) for arm in over_all.arms]
    leads = [
        (arm.arm, *(point.signed() for point in arm.lead.points[1:]), *area_and_since(arm.lead))
        for arm in over_all.arms if arm.lead
    ]  # fmt: skip
    by_benchmark = [
        (arm.arm, curve.of, *area_and_since(arm.lead)) for curve in each for arm in curve.arms if arm.lead
    ]  # fmt: skip
    return [
        plain_table("mean of the benchmarks in % after so many tokens", ["arm", *heads, "area"], heights),
        plain_table(f"{first} ahead by, at the same tokens", ["arm", *heads[1:], "area", "from"], leads),
        plain_table(f"{first} ahead, by benchmark", ["arm", "benchmark", "area", "from"], by_benchmark),
    ]


def area_and_since(lead: Lead) -> tuple[str, str]:
    """The area between two curves, and from which budget on the first arm is ahead."""
    return lead.area.signed(), "never" if lead.since is None else tokens_text(lead.since)


def tokens_text(tokens: int) -> str:
    """`400000` as `0.4 M`."""
    return f"{tokens / 1e6:g} M"


def plain_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts: the first column to the left, the others to the right."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, heading in enumerate(head):
        table.add_column(cell(heading), justify="right" if number else "left", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(cell, row))
    return table


def plan_table(step: str, counts: Mapping[str, int], cost: str | None) -> Table:
    """What a data step would do.

    Args:
        cost: what a teacher would take for it; None where nothing is paid for.
    """
    table = Table(title=f"{step}: what would be done", show_header=False)
    for name, count in counts.items():
        table.add_row(name, str(count))
    table.add_row("paid for", cell(cost or "nothing"))
    return table


def strata_table(strata: Strata, ledger: Ledger) -> Table:
    """Problems in each band, with their share and mean rho; where bands go by the posterior, how sure they are."""
    table = Table(title="difficulty")
    for heading in ("band", "problems", "share", "mean rho"):
        table.add_column(heading, justify="left" if heading == "band" else "right")
    certainty = strata.mean_certainty
    if certainty:
        table.add_column("in their true band", justify="right")
    total = sum(strata.counts.values())
    for band in BAND_NAMES:
        members = getattr(strata, band)
        sure = [f"{100 * certainty[band]:.1f} %" if band in certainty else "-"] if certainty else []
        rhos = [evidence.rho for p in members if (evidence := ledger.get(p.id))]
        mean = f"{sum(rhos) / len(rhos):.2f}" if rhos else "-"
        table.add_row(band, str(len(members)), f"{100 * len(members) / total:.1f} %", mean, *sure)
    return table


def bridge_table(results: Sequence[BridgeResult]) -> Table:
    """For each kind of candidate: proposed, chosen, rejected and why, and the median scores of the others."""
    table = Table(title=f"traces: {sum(r.chosen is not None for r in results)} of {len(results)} problems have one")
    for heading in ("candidate", "proposed", "chosen", "rejected", "RSR", "nats/token", "most for"):
        table.add_column(heading, justify="right" if heading not in ("candidate", "most for") else "left")
    for kind in get_args(Provenance):
        mine = [c for r in results for c in r.candidates if c.trace.provenance == kind]
        if not mine:
            continue
        passed = [c.trace.learnability for c in mine if c.rejected is None and c.trace.learnability]
        faults = Counter(c.rejected.kind for c in mine if c.rejected)
        scores = (
            f"{median(s.rank_surprisal_ratio for s in passed):.2f}" if passed else "-",
            f"{median(s.mean_nll for s in passed):.2f}" if passed else "-",
        )
        chosen = sum(r.chosen is not None and r.chosen.provenance == kind for r in results)
        table.add_row(
            kind, str(len(mine)), str(chosen), str(faults.total()), *scores,
            cell(", ".join(f"{reason} {count}" for reason, count in faults.most_common(2))),
        )  # fmt: skip
    return table


def critique_table(records: Sequence[Critique]) -> Table:
    """For each kind of record: how many passed their checks, and what the others were rejected for."""
    table = Table(title=f"critiques of {len(records)} failed attempts")
    for heading in ("record", "passed", "rejected", "most for"):
        table.add_column(heading, justify="right" if heading in ("passed", "rejected") else "left")
    for kind in ("diagnosis", "repair", "new_trace"):
        passed = sum(kind in record.kinds for record in records)
        reasons = Counter(fault.kind for record in records for fault in record.rejected if fault.part == kind)
        most = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(2))
        table.add_row(kind, str(passed), str(len(records) - passed), cell(most))
    return table
