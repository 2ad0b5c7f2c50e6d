"""Answers and rewards."""

from __future__ import annotations

import gzip
import json
import threading
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmreason.records import Problem
from slmreason.verify.answers import as_number, choice_letter, final_answer, is_correct, last_boxed
from slmreason.verify.rewards import AnswerReward


@pytest.mark.parametrize(
    ("text", "gold", "verdict"),
    [
        (r"So \boxed{42}.", "42", True),
        (r"\boxed{41}, no, \boxed{42}", "42", True),
        (r"\boxed{42}, no, \boxed{41}", "42", False),
        (r"\boxed{42.0}", "42", True),
        (r"\boxed{1,234}", "1234", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\frac{3}{4}}", r"\frac{6}{8}", True),
        (r"\boxed{x^2+2x+1}", r"(x+1)^2", True),
        (r"\boxed{-3}", "3", False),
        ("12 apples\n#### 7", "7", True),
        ("so he has 7 left\nA: 7", "7", True),
        ("the answer is $1,050.", "1050", True),
        ("first 7, then 9", "9", True),
        (r"\boxed{}", "7", False),
        ("", "7", False),
        ("no idea", "7", False),
    ],
)
def test_final_answer_decides(text: str, gold: str, verdict: bool) -> None:
    assert is_correct(text, gold) is verdict


def boxed(answer: str, gold: str, tolerance: float = 0.0) -> bool:
    return is_correct(f"The answer is \\boxed{{{answer}}}.", gold, tolerance=tolerance)


def test_the_recorded_grader_cases_agree(real_data: Path) -> None:
    cases = [json.loads(line) for line in (real_data / "grader_cases" / "cases.jsonl").read_text().splitlines()]
    assert len(cases) == 45
    assert [case for case in cases if boxed(case["pred"], case["gold"]) != bool(case["expected"])] == []


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("10, 4, -2", "10, 4, -2", True),
        ("4, 10, -2", "10, 4, -2", False),
        ("10, 4", "10, 4, -2", False),
        (r"\frac{20}{2}, 4 \text{ and } -2", "10, 4, -2", True),
        (r"\left(10, 4, -2\right)", "10, 4, -2", True),
        ("4, -2, 10", r"\{10, 4, -2\}", True),
        (r"\{4, -2, 10\}", r"\{10, 4, -2\}", True),
        ("$4$, $-2$ and $10$", r"\{10, 4, -2\}", True),
        ("4, 10", r"\{10, 4, -2\}", False),
        ("4, 10, 2", r"\{10, 4, -2\}", False),
        (r"(0, 2.5), (-0.5, 0)", r"\{(-\frac{1}{2}, 0), (0, \frac{5}{2})\}", True),
        (r"(0, 2.5), (0, -0.5)", r"\{(-\frac{1}{2}, 0), (0, \frac{5}{2})\}", False),
        ("8, 221", "$221,$8$", False),
        ("221, 8", "$221,$8$", True),
        (r"(-\infty, 0) \cup \{1\}", r"$(-\infty, 0) \cup\{1\}$.", True),
        ("(5, 6)", "(6, 5)", False),
        ("[1, 2)", "(1, 2)", False),
        ("58500", "58,500", True),
        ("11,111,111,100", r"11,\! 111,\! 111,\! 100", True),
    ],
)
def test_bare_lists_are_ordered_and_sets_are_not(answer: str, gold: str, verdict: bool) -> None:
    assert boxed(answer, gold) is verdict


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        (r"4.5 \times 10^{33}", "4.5e33", True),
        (r"\frac{9}{2} \cdot 10^{33}", "4.5e33", True),
        ("4.6e33", "4.5e33", False),
        ("0.00001", "1e-5", True),
        ("10^{-5}", "1e-5", True),
        ("2e-8", "1e-8", False),
        ("0", "1e-8", False),
        (r"\frac{1}{3} \times 10^{-9}", "3.3e-10", False),
        (r"\frac{1}{10^{9}}", "0.00000002", False),
        (r"\frac{2}{10^{8}}", "0.00000002", True),
        (r"-\frac{1}{3}", "-1./3", True),
        ("-1", "-1./3", False),
        ("45 minutes", "45", True),
        (r"166\,\mathrm{cm}^{2}", "166", True),
        ("166 cm^2", "166", True),
        (r"4.2\%", "4.2", True),
        (r"10\%", "0.1", True),
        ("90^\\circ", "90", True),
        (r"0.\overline{3}", r"0.\overline{3}", True),
        (r"0\overline{3}", r"0.\overline{3}", False),
        ("Evelyn", r"\text{Evelyn}", True),
        (r"\text{Navin}", r"\text{Evelyn}", False),
        ("5x", "5", False),
        ("5 million", "5", False),
        ("5 dollars", "5", True),
        ("1,000,000 people", "1000000", True),
        ("2 1/2", "21/2", False),
        ("a^2+b^2", "a^{2}+b^{2}", True),
        ("e^{-x^2}", "e^{-x^{2}}", True),
        (r"2", r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}", False),
        ("E_1, E_2", "E_{1},E_{2}", True),
    ],
)
def test_numbers_units_and_expressions(answer: str, gold: str, verdict: bool) -> None:
    assert boxed(answer, gold) is verdict


def test_a_tolerance_is_absolute_and_for_decimals() -> None:
    assert boxed("4.3", "4.2", tolerance=0.1)
    assert boxed(r"4.25\%", "4.2", tolerance=0.1)
    assert not boxed("4.31", "4.2", tolerance=0.1)
    assert not boxed("4.2000001", "4.2")
    problem = Problem("p", "q", "4.2", tolerance=0.1)
    assert AnswerReward()(problem, r"\boxed{4.15}").correct


def test_choices_compare_letters_and_nothing_else() -> None:
    assert is_correct(r"\boxed{C}", "C", is_choice=True)
    assert is_correct(r"\boxed{(C) Ann}", "C", is_choice=True)
    assert is_correct(r"\boxed{\text{C}}", "C", is_choice=True)
    assert not is_correct(r"\boxed{D}", "C", is_choice=True)
    assert choice_letter("Cat") is None
    assert not is_correct(r"\boxed{Cat}", "C", is_choice=True)


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "9**9**9",
        "10^{100000000}",
        "99999!",
        r"\frac{" * 3000 + "1",
        "1" * 1_000_000,
        r"\frac{1}{" * 40 + "2" + "}" * 40,
        r"9^{\frac{9^9}{1}}",
        r"9^\frac{9^9}{1}",
        "9^{-99999999}",
        "9^{9*9999999}",
        "((9^{999})^{999})^{999}",
        "9^{9!}",
        "(9!)!",
        r"\exp{\exp{\exp{9}}}",
        "1e999999999",
        "(" * 200,
        "{" * 120 + "}" * 120,
        "1," * 120,
        "1" * 100_000 + "e",
        "and " * 60,
    ],
)
# The second gold answer is a large power itself, which is no excuse for a larger one.
@pytest.mark.parametrize("gold", ["12", "2^{1009}"])
def test_hostile_answers_are_wrong_and_quick(answer: str, gold: str) -> None:
    started = time.process_time()
    assert not is_correct(f"\\boxed{{{answer}}}", gold)
    assert not is_correct(f"The answer is {answer}", gold)
    assert time.process_time() - started < 5


def test_verdicts_work_outside_the_main_thread() -> None:
    verdicts: list[bool] = []
    thread = threading.Thread(target=lambda: verdicts.append(is_correct(r"\boxed{\frac{10}{4}}", r"\frac{5}{2}")))
    thread.start()
    thread.join()
    assert verdicts == [True]


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_gets_a_verdict(text: str) -> None:
    assert is_correct(text, "no such answer 12345") in (True, False)


def test_last_boxed_needs_closed_braces() -> None:
    assert last_boxed(r"\boxed{a{b}c} and \boxed{open") == "a{b}c"
    assert final_answer("a\n#### 5\n") == "5"
    assert as_number("$1,000.50") == as_number("1000.5")
    assert as_number("1,00") is None
    assert as_number("4.5e-3") == as_number(r"4.5 \times 10^{-3}") == Decimal("0.0045")
    assert as_number("-10^{3}") == -1000


def test_reward_is_correctness_plus_the_format_term() -> None:
    problem = Problem("p", "1+1?", "2")
    assert AnswerReward(0.2)(problem, r"\boxed{2}").reward == pytest.approx(1.2)
    assert AnswerReward(0.2)(problem, r"\boxed{3}").reward == pytest.approx(0.2)
    verdict = AnswerReward(0.2)(problem, "3")
    assert (verdict.reward, verdict.correct) == (0.0, False)


def test_recorded_gsm8k_labels_are_reproduced(real_data: Path) -> None:
    path = real_data / "model_solutions" / "gsm8k_gpt3_4x1319.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert len(rows) == 5276
    assert [row for row in rows if is_correct(row["response"], row["gold"]) != row["correct"]] == []


@pytest.mark.parametrize("name", ["gsm8k/train", "math500/test"])
def test_worked_solutions_verify_against_their_own_answer(real_data: Path, name: str) -> None:
    from slmreason.data.sources import load_problems

    loaded = load_problems(str(real_data / f"{name}.jsonl.gz"))
    assert loaded.rejects == ()
    assert [p.id for p in loaded.problems if p.trace and not is_correct(p.trace, p.answer)] == []
