"""What counts as an answer, and what is equal to the gold one: kinds of outputs that real models write."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from slmreason.data.sources import load_problems
from slmreason.records import Problem
from slmreason.verify.answers import Claim, final_answer, is_correct, rule
from slmreason.verify.choices import choice_letter, chosen
from slmreason.verify.rewards import AnswerReward, RewardFn, Verdict
from slmreason.verify.verdicts import graded_completions


def boxed(answer: str, gold: str, **how: float) -> bool:
    return rule([Claim(f"So it is \\boxed{{{answer}}}.", gold, **how)])[0].correct  # type: ignore[arg-type]


def test_the_collected_cases_have_their_verdict() -> None:
    path = Path(__file__).parents[3] / "shared" / "cases" / "grading.jsonl"
    if not path.is_file():
        pytest.skip("the collected cases are not here")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    verdicts = [is_correct(r["text"], r["gold"], "choices" in r, r.get("tolerance", 0.0)) for r in rows]
    assert [r for r, verdict in zip(rows, verdicts, strict=True) if verdict != r["correct"]] == []


# Where the answer stands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is **12**.", "12"),
        ("**Answer:** 12", "12"),
        ("## Final Answer\n\n12", "12"),
        ("**Final Answer**: $\\frac{3}{4}$", "\\frac{3}{4}"),
        ("Final Answer: The final answer is $4\\sqrt7$. I hope it is correct.", "4\\sqrt7"),
        ("The answer should be 9.", "9"),
        ("The answer is indeed 9", "9"),
        ("The final answer, rounded to 2.5 places, is 3.14", "3.14"),
        ("The answer to question 3 is 7.", "7"),
        ("The answer is: -5", "-5"),
        ("the answer is approximately 3.2", "3.2"),
        ("Answer = 12", "12"),
        ("answer:\n\n12", "12"),
        ("<answer>\n12\n</answer>", "12"),
        ("<answer>The answer is 12.</answer>", "12"),
        ("\\boxed{3} <answer>4</answer>", "4"),
        ("The answer is 7 dollars per hour", "7"),
        ("The answer is 2, since 1+1=2.", "2"),
        ("The answer is $5. He has $3 left.", "5"),
        ("The answer is $4$, $-2$ and $10$.", "4, -2, 10"),
        ("The answer is 9 million people.", "9 million"),
        ("The answer is 1/2 of it", "1/2"),
        ("The answer is twelve.", "twelve"),
        ("The answer is one of the numbers 3 and 4", "4"),
        ("#### Step 1: add\n1+1=2\n#### Step 2: conclude\nThe result is 2", "2"),
        ("#### 24 apples", "24"),
        ("She answered 9 questions. In all that makes 27", "27"),
        ("It comes to 58. I believe that's the answer.", "58"),
        ("The answer is not 7. We get 8", "8"),
        ("the answer is not 5", None),
        ("The answer is at least 5", r"\ge 5"),
        ("It could be 5, 6, or 7.", "6, 7"),
        ("My answer is 7!", "7"),
        (r"With \cos A: 3 we have 4", "4"),
        ("What is the answer? Let us see: 5 + 6 = 11", "5 + 6 = 11"),
        (r"Hence it is $\frac58$.", r"\frac58"),
        (r"\[ 7 \]", "7"),
        ("So it costs $20.", "20"),
        ("GPT-4 says 5", "5"),
        ("1. Add them\n2. We get 12", "12"),
        ("16 people think that horse #12 will win", "16"),
        (r"$a = -\boxed{256}$", "-256"),
        (r"$\boxed{3}$ and $\boxed{4}$", "3, 4"),
        (r"\boxed 3", "3"),
        (r"\boxed{9} million", "9 million"),
        ("no idea", None),
        ("I believe that's the answer.", None),
    ],
)
def test_the_answer_is_an_expression_and_not_what_follows_a_mark(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "<think>3*4 = 12. Wait, check again: 3*4 = 12",
        "<think>the answer is 12",
        r"<think>\boxed{12}",
        "<think>a</think> Hmm. <think>12",
        r"so \boxed{12}</think>",
        r"<|begin_of_thought|>\boxed{12}",
    ],
)
def test_a_thought_never_gives_the_answer(text: str) -> None:
    assert final_answer(text) is None


def test_what_stands_before_or_after_a_thought_does() -> None:
    assert final_answer("<think>1+1 is 2</think><answer>2</answer>") == "2"
    assert final_answer(r"\boxed{2} <think>or 3") == "2"
    assert final_answer("a thought that the prompt opened: 5</think>The answer is 6.") == "6"


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("We add 5 and 7 and get 12", False),  # by accident, for all we know
        ("The answer is 12", False),  # perhaps 120
        ("The answer is 12. Let me check that", True),
        (r"\boxed{12} Let me", True),
        ("#### 12\nand now", True),
        ("<answer>12</answer> so", True),
        ("<answer>12", False),
    ],
)
def test_a_text_that_was_cut_off_counts_only_with_a_finished_answer(text: str, is_right: bool) -> None:
    assert is_correct(text, "12", truncated=True) is is_right
    problem = Problem("p", "?", "12")
    [verdict] = graded_completions(AnswerReward(0.5), [(problem, text)], [True])
    assert verdict.correct is is_right
    assert (verdict.reward >= 1) is is_right
    assert is_correct(text, "12")


def test_a_reward_that_reads_answers_in_another_form_judges_cut_off_texts_itself() -> None:
    class Coin(RewardFn):
        def __call__(self, problem: Problem, text: str) -> Verdict:
            return Verdict(1.0, True)

    assert graded_completions(Coin(), [(Problem("p", "?", "12"), "it is")], [True]) == [Verdict(1.0, True)]


def test_a_cut_off_text_earns_what_no_answer_earns() -> None:
    class Lenient(RewardFn):
        wants_finished_answer = True

        def __call__(self, problem: Problem, text: str) -> Verdict:
            return Verdict(2.0 if problem.answer in text else 0.25, problem.answer in text)

    problem = Problem("p", "?", "12")
    graded = graded_completions(Lenient(), [(problem, "it is 12"), (problem, "it is 12")], [True, False])
    assert graded == [Verdict(0.25, False), Verdict(2.0, True)]


# Options --------------------------------------------------------------------------------------------------------------

OPTIONS = ("10", "12", "dog", r"$\frac{1}{2}$")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b", "B"),
        ("**B**", "B"),
        ("B.", "B"),
        ("[B]", "B"),
        (r"\textbf{(B)}", "B"),
        (r"\mathrm{B}", "B"),
        ("Option B", "B"),
        ("option b", "B"),
        ("B) 12", "B"),
        ("B)12", "B"),
        ("B: 12", "B"),
        ("B (12)", "B"),
        ("A is correct", "A"),
        ("B, because A is wrong", "B"),
        ("A. The cat", "A"),
        ("a", "A"),
        ("B or C", None),
        ("B, C", None),
        ("B/C", None),
        ("BC", None),
        ("(B) and (C)", None),
        ("A and C", None),
        ("both A and B", None),
        ("B or maybe C", None),
        ("A, B, C, D", None),
        ("B & D", None),
        ("Cat", None),
        ("A triangle", None),
        ("12", None),
        ("none", None),
        ("B^2", None),
        ("F", None),
    ],
)
def test_a_letter_is_read_in_any_dress_and_two_letters_are_a_hedge(answer: str, letter: str | None) -> None:
    assert choice_letter(answer, num_options=5) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct option is B.", "B"),
        ("The answer is B, because A is wrong.", "B"),
        ("Answer choice B is right", "B"),
        ("Option B is correct.", "B"),
        ("**Answer:** (C)", "C"),
        ("A is wrong.\nB is wrong.\nC", "C"),
        (r"\boxed{12}", "B"),
        (r"\boxed{0.5}", "D"),
        ("The answer is a dog, since it barks.", "C"),
        (r"\boxed{B) 10}", None),  # a letter with another option's text
        ("the answer is E", None),
        ("<think>the answer is B", None),
        ("The answer is A or B.", None),
        ("The answer is neither A nor B.", None),
        ("12 and 10 and a dog", None),
    ],
)
def test_an_option_is_chosen_by_its_letter_or_its_text(text: str, letter: str | None) -> None:
    assert chosen(text, OPTIONS) == letter


def test_the_texts_of_the_options_reach_the_verifier() -> None:
    problem = Problem("p", "?", "B", choices=OPTIONS)
    verdicts = AnswerReward().grade([(problem, text) for text in (r"\boxed{12}", r"\boxed{10}", r"\boxed{B}")])
    assert [verdict.correct for verdict in verdicts] == [True, False, True]


# What is equal and what is not ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5!", "120"),
        (r"\binom{5}{2}", "10"),
        (r"\binom52", "10"),
        (r"3! \cdot 2", "12"),
        (r"\sin u", r"\sin(u)"),
        (r"\sin t", r"\sin(t)"),
        (r"\pm 3", "3,-3"),
        (r"\pm 3", "-3, 3"),
        (r"x = \pm 3", r"\{3, -3\}"),
        (r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}"),
        ("½", r"\frac{1}{2}"),
        ("2½", r"\frac{5}{2}"),
        ("√2", r"\sqrt2"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("x²", "x^2"),
        ("10³", "1000"),
        ("0.3̅", r"\frac{1}{3}"),
        ("2π", r"2\pi"),
        ("−3", "-3"),
        ("x ≥ 4", r"x \ge 4"),
        (r"12.\overline{6}", r"\frac{38}{3}"),
        (r"0.1\overline{6}", r"\frac{1}{6}"),
        (r"\textbf{8}", "8"),
        (r"\mathbf{8}", "8"),
        (r"{\bf 8}", "8"),
        ("**8**", "8"),
        ("twenty-one", "21"),
        (r"\text{twelve}", "12"),
        ("three quarters", r"\frac{3}{4}"),
        ("two hundred and five", "205"),
        ("x>4", r"(4,\infty)"),
        (r"x \in (4,\infty)", r"(4,\infty)"),
        ("4 < x < 7", "(4,7)"),
        ("4 \\le x \\le 7", "[4,7]"),
        (r"(4,\infty)", "x>4"),
        (r"x\le 5", r"(-\infty, 5]"),
        ("7 dollars per hour", "7"),
        ("15 square units", "15"),
        (r"15\text{ cm}^2", "15"),
        (r"9.8 \text{ m}/\text{s}^2", "9.8"),
        ("30 km/h", "30"),
        ("20^\\circ C", "20"),
        ("5 m", "5"),
        (r"12^{\text{th}}", "12"),
        (r"9\text{ million}", "9000000"),
        ("1.5 million", "1,500,000"),
        ("5 dozen", "60"),
        ("6(6)", "36"),
        ("3+4=7", "7"),
        ("f(x) = 2x", "2x"),
        (r"\text{Area} = 12", "12"),
        ("58 500", "58500"),
        (r"11{,}111", "11111"),
        ("1, 2", "(1,2)"),
        ("2x+1, 1+2x", "2x+1"),
        (r"\frac{3t}{5}", r"\frac35 t"),
        ("even", r"\text{even}"),
        ("Even", r"\text{even}"),
        (r"35.0\%", "35"),
        (r"\text{4.2 \%}", r"4.2\%"),
        (r"\tan^2 x + 1", r"\sec^2 x"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        ("321", "321_5"),
        ("321_{5}", "321_5"),
        (r"\frac{1}{3}E_1+\frac{2}{3}E_2", r"\frac{E_1+2E_2}{3}"),
        (r"3.10\times10^{-21}", r"3.1\times10^{-21}"),
        (r"(-\infty,2)\cup(3,\infty)", r"x<2 \text{ or } x>3"),
        (r"x<2 \text{ or } x>3", r"(-\infty,2)\cup(3,\infty)"),
        ("0.333...", r"\frac{1}{3}"),
        ("0.333333", r"\frac{1}{3}"),
        ("17.999999999999996", "18"),
        ("(1011)_2", "1011_2"),
        (r"x \equiv 5 \pmod 7", "5"),
        ("N", "n"),
        ("a+b", "A+B"),
        (r"18\frac{\text{km}}{\text{h}}", "18"),
    ],
)
def test_these_are_equal(answer: str, gold: str) -> None:
    assert boxed(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        # Small numbers, and none at all.
        (r"\frac{1}{10^{25}}", r"3.1\times10^{-21}"),
        (r"5\times10^{-21}\text{ N}", r"3.1\times10^{-21}"),
        ("0", r"3.1\times10^{-21}"),
        (r"\text{N}", r"3.1\times10^{-21}"),
        (r"5\times10^{-21} t", r"3.1\times10^{-21} t"),
        ("0", r"6.6\times10^{-34} f"),
        (r"\text{cm}", "5"),
        ("", "0"),
        (r"\text{}", "0"),
        # Letters that are no units, and letters whose case matters.
        (r"\frac35", r"\frac35 t"),
        ("6", "6m"),
        ("5x", "5"),
        ("5 x", "5"),
        ("3", "3i"),
        ("0", "R^2-r^2"),
        ("R^2-R^2", "R^2-r^2"),
        ("2", "2a"),
        # Notations that hold another number.
        ("6(6)", "12"),
        (r"9\text{ million}", "9"),
        ("9 million", "9"),
        ("9 dozen", "9"),
        ("321_7", "321_5"),
        ("52_8", "52"),
        ("42", "52_8"),
        (r"12.\overline{6}", "12"),
        (r"12.\overline{6}", "12.6"),
        ("2 1/2", "21/2"),
        ("5 factorial", "5"),
        ("5 squared", "5"),
        # Relations are no numbers.
        (r"\ne 9", "9"),
        (r"\ge 9", "9"),
        ("x > 9", "9"),
        (r"x \ne 9", "9"),
        ("9", r"x \ge 9"),
        (r"\not= 9", "9"),
        ("x<4", r"(4,\infty)"),
        # One of several, and several for one.
        ("3", "3,-3"),
        ("5 or 6", "5"),
        (r"5 \text{ or } 6", "5"),
        ("5, 6", "5"),
        (r"\pm 5", "5"),
        ("5; 6", "5"),
        (r"\{5, 6\}", "5"),
        ("5 \\lor 6", "5"),
        ("2 hours and 20 minutes", "2"),
        # Units that are known and differ.
        ("5 cm", r"5\text{ m}"),
        ("5 cents", "5 dollars"),
        ("36 feet", r"36\text{ inches}"),
        ("17.99999999", "18"),
        # Values at simple points, and equations whose last side is no answer.
        ("-1", r"2 \cos (\pi t+\pi / 3)"),
        ("0", "5x - 7y + 11z + 4 = 0"),
        ("0.333", r"\frac{1}{3}"),
        (r"(-\infty,2]\cup(3,\infty)", r"x<2 \text{ or } x>3"),
        ("odd", r"\text{even}"),
        ("5", r"\text{even}"),
        ("x", r"\text{x-axis}"),
        ("100", "0.01"),
    ],
)
def test_these_are_not(answer: str, gold: str) -> None:
    assert not boxed(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("v = 4.21", "4.2", True),
        (r"v \approx 4.21", "4.2", True),
        (r"\approx 4.21", "4.2", True),
        ("4.21 cm", "4.2", True),
        (r"\frac{421}{100}", "4.2", True),
        (r"3\sqrt{2}", "4.2", True),
        (r"\{4.21, 1.05\}", r"\{1, 4.2\}", True),
        ("1.05, 4.21", "1, 4.2", True),
        ("v = 4.31", "4.2", False),
        (r"\{4.21, 1.2\}", r"\{1, 4.2\}", False),
        (r"3\sqrt{3}", "4.2", False),
    ],
)
def test_a_tolerance_holds_in_any_form(answer: str, gold: str, verdict: bool) -> None:
    assert boxed(answer, gold, tolerance=0.1) is verdict


def test_the_tolerance_of_minerva_is_one_percent_of_the_gold_number(real_data: Path) -> None:
    [problem] = [
        p for p in load_problems(f"minerva={real_data / 'minerva' / 'test.jsonl'}").problems if p.answer == "41.8"
    ]
    assert problem.relative_tolerance == 0.01
    reward = AnswerReward()
    assert [reward(problem, rf"\boxed{{{answer}}}").correct for answer in ("41.8", "42.2", "42.3", "41.3")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_long_gold_answer_repeated_to_the_letter_is_right() -> None:
    gold = " + ".join(f"{i}x^{{{i}}}" for i in range(1, 50))
    assert len(gold) > 400
    assert boxed(gold, gold)
    assert not boxed(gold + "+1", gold)


# Strings that know nothing of the gold answer -------------------------------------------------------------------------

UNIVERSAL = r"""
x|n|m|y|i|e|a|ab|xyz|\pi|\alpha|\theta|x_1|f(x)|f(x)=x|x = x|0 = 0|1 = 1|0=x|\text{}|{}|()|[]|\{\}|\emptyset
\varnothing|\infty|-\infty|(-\infty,\infty)|\mathbb{R}|nan|None|null|undefined|\text{DNE}|zoo|\text{m}
\text{cm}|cm|kg|\text{units}|dollars|%|\%|\$|=|+|-|\cdot|\times|...|\ldots|\ne 0|\ge 0|> 0|< 0|\le 0|x \ne 0
x > 0|x \in \mathbb{R}|\pm x|\text{all real numbers}|\text{or}|A or B|1 or 2|1, 2, 3, 4, 5|1e-30|10^{-30}
10^{-300}|\frac{1}{0}|0/0|\sqrt{x^2}|x^0|0x|0 \cdot x|n \text{ is any integer}|\sum|\int|\int x dx
\frac{d}{dx}|\lim|x_n|1_2|\begin{matrix} \end{matrix}|(x,y)|0 < x < 1|\{x\}|1 \text{ or anything}|0 \approx 1
\text{cannot be determined}|\text{ft}|\circ|^\circ|'|"|&|#|\text{the answer}|unknown|\log|\sin|\ge|\ne|\approx
\sim|\text{any number}|\text{million}|dozen|_|^|_{10}|\overline{0}|0.\overline{0}1|1/x|x!
"""


def test_a_string_that_knows_nothing_of_the_gold_answer_never_passes(real_data: Path) -> None:
    files = {
        "math500": "math500/test.jsonl.gz",
        "minerva": "minerva/test.jsonl",
        "olympiadbench": "olympiadbench/test.jsonl.gz",
    }
    problems = [p for name, file in files.items() for p in load_problems(f"{name}={real_data / file}").problems]
    numbers = load_problems(f"openai/gsm8k={real_data / 'gsm8k' / 'train.jsonl.gz'}").problems[:400]
    strings = [string.strip() for string in UNIVERSAL.replace("\n", "|").split("|") if string.strip()]
    assert len(strings) > 100
    # Every third gold answer, which ones in turn; all of them take minutes and gave nothing more.
    claims = [
        Claim(f"\\boxed{{{string}}}", problem.answer, False, problem.tolerance, problem.relative_tolerance)
        for at, (string, problem) in enumerate(product(strings, [*problems[::3], *numbers[::8]]))
        if at % 3 == 0
    ]
    passed = {(claim.text, claim.gold) for claim, ruling in zip(claims, rule(claims), strict=True) if ruling.correct}
    assert passed <= ARE_THE_GOLD


ARE_THE_GOLD = {
    (f"\\boxed{{{string}}}", gold)
    for string, golds in {
        "n": ("$f(n)=n$", "$N=n$"),
        "m": ("m",),
        r"\text{m}": ("m",),
        r"\le 0": (r"(-\infty, 0]",),
        "1 = 1": ("1", r"100 \%"),
        r"0 \cdot x": ("0",),
        r"\pm x": (r"\{f(x)=x, f(x)=-x\}",),
        "1 or 2": (r"\{1, 2\}",),
        r"\pi": (r"\pi",),
        r"\alpha": (r"\alpha",),
        "x^0": (r"100 \%", "$k=1$", "$f(x)=1$"),
    }.items()
    for gold in golds
}
"""Strings that are a gold answer."""
