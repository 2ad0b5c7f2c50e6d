"""Answers, rewards and equations."""

from __future__ import annotations

import gzip
import json
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmreason.records import Problem
from slmreason.verify.answers import as_number, choice_letter, final_answer, is_correct, last_boxed
from slmreason.verify.arithmetic import equation_holds, evaluate, false_equations, read_equations
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
    ],
)
def test_hostile_answers_are_wrong_and_quick(answer: str) -> None:
    started = time.perf_counter()
    assert not is_correct(f"\\boxed{{{answer}}}", "12")
    assert time.perf_counter() - started < 5


def test_verdicts_work_outside_the_main_thread() -> None:
    verdicts: list[bool] = []
    thread = threading.Thread(target=lambda: verdicts.append(is_correct(r"\boxed{\frac{10}{4}}", r"\frac{5}{2}")))
    thread.start()
    thread.join()
    assert verdicts == [True]


@given(st.text(max_size=200))
def test_any_text_gets_a_verdict(text: str) -> None:
    assert is_correct(text, "no such answer 12345") in (True, False)


def test_last_boxed_needs_closed_braces() -> None:
    assert last_boxed(r"\boxed{a{b}c} and \boxed{open") == "a{b}c"
    assert final_answer("a\n#### 5\n") == "5"
    assert as_number("$1,000.50") == as_number("1000.5")
    assert as_number("1,00") is None


def test_reward_is_correctness_plus_the_format_term() -> None:
    problem = Problem("p", "1+1?", "2")
    assert AnswerReward(0.2)(problem, r"\boxed{2}").reward == pytest.approx(1.2)
    assert AnswerReward(0.2)(problem, r"\boxed{3}").reward == pytest.approx(0.2)
    verdict = AnswerReward(0.2)(problem, "3")
    assert (verdict.reward, verdict.correct) == (0.0, False)


@pytest.mark.parametrize(
    ("equation", "holds"),
    [
        ("48/2=24", True),
        ("12 * 4 = 49", False),
        ("2 + 3 * 4 = 14", True),
        ("(2 + 3) * 4 = 20", True),
        ("10 / 3 = 3.33", True),
        ("10 / 3 = 3.34", False),
        ("5 - 8 = -3", True),
        ("1,200 + 1 = 1,201", True),
        ("3 + 4 = 5 + 2 = 7", True),
        ("7 = 7", None),
        ("1 / 0 = 1", None),
    ],
)
def test_equations_hold_exactly(equation: str, holds: bool | None) -> None:
    assert equation_holds(equation) is holds


def test_equations_are_read_from_prose_and_annotations() -> None:
    text = "He sold 48/2 = <<48/2=24>>24 clips. Then 24 + 48 = 73, and x + 1 = 2."
    assert [e.text for e in read_equations(text)] == ["48/2 =  24", "48/2=24", "24 + 48 = 73"]
    assert false_equations(text) == ["24 + 48 = 73"]


@given(st.integers(-99, 99), st.integers(1, 99), st.integers(1, 99))
def test_evaluate_is_exact(a: int, b: int, c: int) -> None:
    assert evaluate(f"({a} - {b}) / {c} * {b}") == Fraction(a - b, c) * b
    assert evaluate("__import__('os')") is None


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
