"""The benchmarks' real files: every row is read, every gold answer verifies, and no other does."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest

from slmreason.data.files import local_rows
from slmreason.data.sources import KNOWN, load_problems
from slmreason.records import Problem
from slmreason.verify.answers import as_number, is_correct, list_items, same_value, tidy
from slmreason.verify.quantities import without_unit

FILES = {
    "openai/gsm8k": ("gsm8k/train.jsonl.gz", 7473),
    "gsm8k": ("gsm8k/test.jsonl.gz", 1319),
    "svamp": ("svamp/test.jsonl.gz", 1000),
    "mawps": ("mawps/test.jsonl.gz", 2065),
    "math500": ("math500/test.jsonl.gz", 500),
    "amc23": ("amc23/test.jsonl", 40),
    "aime24": ("aime24/test.jsonl", 30),
    "minerva": ("minerva/test.jsonl", 272),
    "olympiadbench": ("olympiadbench/test.jsonl.gz", 675),
}

SAME_TEXT_ONLY = {
    "minerva": [
        "np.arcsin(10/13)",  # numpy, not mathematics
        r"\frac{dM}{dt}=\frac{10^{5} L_{\odot}}{0.007 c^{2} M_{\odot}^{6}} M^{6}",  # dM and the sun's sign
    ],
    "olympiadbench": [
        r"$m_{\max }=n^{2}-n-1$",  # a command as an index
        r"\{f(x)=a x+b, where b is an arbitrary integer, a is an arbitrary positive integer with \mho(a)=0\}",  # prose
        "$t(0,4]$",  # meant is t in (0, 4]
    ],
}
"""Gold answers that math-verify cannot read: an answer is right only if it is the same text, spacing aside."""

HARD = ("math500", "minerva", "olympiadbench")
"""The benchmarks with more than numbers for an answer."""


@lru_cache
def problems_of(folder: Path, name: str) -> tuple[Problem, ...]:
    loaded = load_problems(f"{name}={folder / FILES[name][0]}")
    assert loaded.rejects == ()
    return loaded.problems


def accepts(problem: Problem, answer: str) -> bool:
    return is_correct(f"The answer is \\boxed{{{answer}}}.", problem.answer, tolerance=problem.tolerance)


def as_listed(problem: Problem) -> str:
    """The gold answer as a model would write it: a set of answers without the braces."""
    return problem.answer[2:-2] if len(set_of(problem)) > 1 else problem.answer


def set_of(problem: Problem) -> list[str]:
    whole = re.fullmatch(r"\\\{(.*)\\\}", problem.answer)
    return list_items(whole.group(1)) if whole else []


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_read(real_data: Path, name: str) -> None:
    problems = problems_of(real_data, name)
    assert len(problems) == FILES[name][1]
    assert len({problem.id for problem in problems}) == len(problems)
    assert all(problem.question and problem.answer for problem in problems)


@pytest.mark.parametrize("name", FILES)
def test_every_gold_answer_verifies_against_itself(real_data: Path, name: str) -> None:
    problems = problems_of(real_data, name)
    assert [problem.answer for problem in problems if not accepts(problem, as_listed(problem))] == []
    # Item by item, because items that are the same text would pass inside of a list.
    by_text = [p.answer for p in problems if not all(same_value(item, item) for item in list_items(tidy(p.answer)))]
    assert by_text == SAME_TEXT_ONLY.get(name, [])


@pytest.mark.parametrize("name", FILES)
def test_the_gold_answer_of_the_next_row_is_wrong(real_data: Path, name: str) -> None:
    problems = problems_of(real_data, name)
    pairs = [(mine, other) for mine, other in zip(problems, problems[1:], strict=False) if mine.answer != other.answer]
    assert len(pairs) > 0.8 * len(problems)
    accepted = [(mine.answer, other.answer) for mine, other in pairs if accepts(mine, as_listed(other))]
    assert accepted == ([("5", "x=5")] if name == "math500" else [])  # these two are equal


@pytest.mark.parametrize("name", [name for name in FILES if name not in HARD])
def test_a_number_beside_the_gold_one_is_wrong(real_data: Path, name: str) -> None:
    problems = problems_of(real_data, name)
    golds = [as_number(problem.answer) for problem in problems]
    assert None not in golds
    assert [p.answer for p, gold in zip(problems, golds, strict=True) if accepts(p, str(gold + 1))] == []  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "equal"),
    [
        # Equal to their number: an equation solved for its unknown, and a number in another base without the base.
        ("math500", ["x=5", "52_8", "40_9", "2516_8", "4210_{5}", "204_5", "4343_6"]),
        ("minerva", [r"100 \%"]),
        ("olympiadbench", ["$k=1$", "$f(x)=1$", "$k=3$", r"$8 \%$"]),
    ],
)
def test_a_number_from_a_gold_expression_is_not_the_expression(real_data: Path, name: str, equal: list[str]) -> None:
    accepted = []
    for problem in problems_of(real_data, name):
        numbers = re.findall(r"\d+", problem.answer)
        value, _ = without_unit(tidy(problem.answer))
        if as_number(value) is None and any(accepts(problem, n) for n in {*numbers[:1], *numbers[-1:]}):
            accepted.append(problem.answer)
    assert accepted == equal


@pytest.mark.parametrize(("name", "lists"), [("math500", 4), ("olympiadbench", 91)])
def test_lists_of_solutions_count_in_any_order_and_only_whole(real_data: Path, name: str, lists: int) -> None:
    readable = [p for p in problems_of(real_data, name) if p.answer not in SAME_TEXT_ONLY.get(name, [])]
    problems = [problem for problem in readable if len(set_of(problem)) > 1]
    assert len(problems) == lists
    for problem in problems:
        items = set_of(problem)
        assert accepts(problem, ", ".join(reversed(items))), problem
        assert accepts(problem, " and ".join(f"${item}$" for item in items)), problem
        assert not accepts(problem, ", ".join([*items, "-987"])), problem
        # math-verify's sets count a double solution once: -2, -2.
        assert not accepts(problem, ", ".join(items[1:])) or len(set(items)) == 1, problem


def test_a_unit_does_not_make_a_right_olympiad_answer_wrong(real_data: Path) -> None:
    file = real_data / FILES["olympiadbench"][0]
    units = {
        problem.id: (problem, row["unit"].strip("$"))
        for problem, (_, row) in zip(problems_of(real_data, "olympiadbench"), local_rows(file), strict=True)
        if row["unit"] and "angle" not in problem.answer  # that gold is two equations
    }
    assert {unit for _, unit in units.values()} == {"minute", "minutes", "min", "km", "km/h", "cm^2", "%"}
    for problem, unit in units.values():
        gold = problem.answer.strip("$")
        unit = unit.replace("%", r"\%")
        for answer in (gold, f"{gold} {unit}", rf"{gold}\text{{ {unit}}}", rf"{gold}\,\mathrm{{{unit}}}"):
            assert accepts(problem, answer), (problem.answer, answer)
        assert not accepts(problem, f"1{gold} {unit}")


def test_the_tolerance_of_an_olympiad_row_reaches_the_verifier(real_data: Path) -> None:
    [problem] = [problem for problem in problems_of(real_data, "olympiadbench") if problem.tolerance]
    assert (problem.answer, problem.tolerance) == ("4.2", 0.1)
    assert accepts(problem, "4.25")
    assert accepts(problem, r"4.2\%")
    assert not accepts(problem, "4.31")


def test_every_benchmark_of_the_table_has_a_name() -> None:
    table = "gsm8k gsm8k_platinum svamp mawps math500 logiqa amc23 aime24 minerva olympiadbench"
    assert set(table.split()) <= set(KNOWN)
