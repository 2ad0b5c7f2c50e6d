"""Gold answers: read where they stand, and rejected where no answer could ever equal them."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmreason.data.golds import is_simple, read_gold
from slmreason.data.rows import as_text
from slmreason.data.sources import Columns, Loaded, load_problems
from slmreason.verify.answers import Claim, rule

CASES = Path(__file__).parents[2].parent / "shared" / "cases" / "gold.jsonl"


def load(folder: Path, rows: list[dict[str, Any]], **columns: Any) -> Loaded:
    file = folder / "pool.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return load_problems(f"pool={file}", Columns(**columns) if columns else None)


def test_each_case_that_failed_once_gives_its_gold(tmp_path: Path) -> None:
    if not CASES.is_file():
        pytest.skip("the cases are not here")
    for line in CASES.read_text().splitlines():
        case = json.loads(line)
        [problem] = load(tmp_path, [case["row"]], **case["columns"]).problems
        assert problem.answer == case["gold"]


@pytest.mark.parametrize(
    ("written", "gold"),
    [
        ("4 * 6 = 24\n#### 24\nThe answer is: 24", "24"),
        ("#### 24\r\n\r\nThat is all.", "24"),
        ("####\n24\n", "24"),
        ("#### **24**", "24"),
        ("#### The answer is 24", "24"),
        ("#### 24 The answer is: 24", "24"),
        ("#### 24 lemons are left over.", "24"),
        ("#### 24 lemons", "24 lemons"),
        ("#### -1,234.5", "-1,234.5"),
        ("#### x^2 + 1\nwhich is what was asked", "x^2 + 1"),
        ("so there are $\\boxed 3$ of them", "3"),
        ("so there are \\boxed 3 of them, at $5 each", "3"),
        ("\\boxed12", "12"),
        ("\\boxed -3.", "-3"),
        ("$\\boxed\\frac12$", "\\frac12"),
        ("$\\boxed 3\\pi$", "3\\pi"),
        ("the right one is \\fbox B", "B"),
        ("first \\boxed{1}, then \\boxed 2", "2"),
        ("first \\boxed 1, then \\boxed{2}", "2"),
        ("<think>first \\boxed{1}</think> no: \\boxed{2}", "2"),
        ("I think so. <answer> 7 </answer>", "7"),
        ("She has 4 * 6 of them. The answer is 24.", "24"),
    ],
)
def test_the_answer_is_read_where_it_stands(written: str, gold: str) -> None:
    assert read_gold(written)[0] == gold


@pytest.mark.parametrize(
    "gold",
    ["24", "-7", "1,234", "1/3", "x=5", "24 hours", "3 feet 4 inches", "50%", "no solution", "all real numbers",
     "June 20", "\\text{even}", "\\infty", "∅", "π", "(3, \\frac{\\pi}{2})", "2, 3", "St. Mary's", "1e5", "Yes",
     "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}"],
)  # fmt: skip
def test_an_answer_stays_as_it_is(gold: str) -> None:
    assert read_gold(gold) == (gold, None)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("She has 24 lemons.", "is prose"),
        ("It depends on the number of lemons", "is prose"),
        ("First add the lemons. Then take 3 away.", "is prose"),
        ("10 because 5 + 5", "is prose"),
        ("24\n25", "has several lines"),
        ("N/A", "says nothing"),
        ("?", "says nothing"),
        ("$$", "says nothing"),
        ("#### ", "empty answer"),
        ("\\boxed{3", "its brace never closes"),
        ("<think>so \\boxed{3}", "never closes"),
        ("1" * 2000, "too long"),
    ],
)
def test_what_no_answer_can_equal_is_rejected(tmp_path: Path, written: str, says: str) -> None:
    loaded = load(tmp_path, [{"question": "1?", "answer": "1"}, {"question": "2?", "answer": written}])
    assert [problem.question for problem in loaded.problems] == ["1?"]
    [reject] = loaded.rejects
    assert reject.where.endswith("line 2")
    assert says in reject.reason


def test_a_gold_that_is_not_equal_to_itself_is_rejected_in_the_order_of_the_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": f"{n}?", "answer": a} for n, a in enumerate(["1", "{2", "\\frac{1}{2}"])]
    loaded = load(tmp_path, [*rows, {"question": "no answer"}], answer_format="plain", answer="answer")
    assert [problem.answer for problem in loaded.problems] == ["1", "\\frac{1}{2}"]
    assert [reject.where.rpartition(" ")[2] for reject in loaded.rejects] == ["2", "4"]
    assert "does not verify against itself: '{2'" in loaded.rejects[0].reason


def test_a_simple_gold_equals_itself_as_the_verifier_sees_it(real_data: Path) -> None:
    golds = [
        problem.answer
        for name in ("math500/test.jsonl.gz", "olympiadbench/test.jsonl.gz", "minerva/test.jsonl")
        for problem in load_problems(f"{name.partition('/')[0]}={real_data / name}").problems
        if is_simple(problem.answer)
    ]
    made = [
        "\\frac{1}{2}",
        "x^{2}+y_1",
        "(1, 2]",
        "{",
        "}{",
        "x, y",
        "\\sqrt{\\frac{2}{3}}",
        "a=b",
        "f(x)=2x",
        "1. 5",
        "{{1}",
    ]
    golds += [gold for gold in made if is_simple(gold)]
    assert len(golds) > 500
    rulings = rule(Claim(f"It is \\boxed{{{gold}}}.", gold) for gold in golds)
    assert [gold for gold, ruling in zip(golds, rulings, strict=True) if not ruling.correct] == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece", ["answer is", " ", "<answer>", "\\boxed", "\\boxed{", "#### ", "$", "a, ", "\n", "1,", "(B) "]
)
def test_reading_takes_time_in_proportion_to_the_text(tmp_path: Path, piece: str) -> None:
    long = f"answer{piece * 50_000}!"
    load(tmp_path, [{"question": "1?", "answer": "1"}, {"question": "2?", "answer": long}])
    load(tmp_path, [{"question": "1?", "o": ANIMALS, "answer": "A"}, {"question": "2?", "o": ANIMALS, "answer": long}],
         choices="o")  # fmt: skip


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1 + 0.2, "0.3"), (1.1 * 1.1, "1.21"), (2.675 * 100, "267.5"), (0.07 * 100, "7"), (sum([0.1] * 10), "1"),
        (7.0, "7"), (-0.0, "0"), (1 / 3, "0.3333333333333333"), (2**0.5, "1.4142135623730951"), (1e22, "1" + "0" * 22),
        (1e-7, "0.0000001"), (123456789.123, "123456789.123"), (9007199254740992.0, "9007199254740992"),
        (Decimal("24.00"), "24"), (Decimal("0.10"), "0.1"), (Decimal("1E+3"), "1000"), (12, "12"),
        (2**-16, "0.0000152587890625"), (2499.89990234375, "2499.9"), (1000000.125, "1000000.125"),
    ],
)  # fmt: skip
def test_a_number_is_the_decimal_that_was_meant(value: Any, text: str) -> None:
    assert as_text(value, "it") == text


@given(st.integers(1, 99_999), st.integers(1, 4))
def test_a_decimal_that_was_kept_as_float32_reads_as_it_was_written(digits: int, places: int) -> None:
    written = Decimal(digits) / 10**places
    narrow = float(np.float32(float(written)))
    assert Decimal(as_text(narrow, "it")) == written


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_double_reads_as_a_number_next_to_it(value: float) -> None:
    text = as_text(value, "it")
    assert float(text) == pytest.approx(value, rel=1e-7)


@given(st.integers(-(10**9), 10**9), st.integers(0, 6))
def test_a_short_decimal_is_not_changed(digits: int, places: int) -> None:
    written = Decimal(digits) / 10**places
    assert Decimal(as_text(float(written), "it")) == written


def test_floats_of_a_float32_column_read_as_they_were_stored(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    answers = pa.array([0.1, 1000000.1, 2.5, 7.0], pa.float32())
    pq.write_table(pa.table({"question": list("abcd"), "answer": answers}), tmp_path / "a.parquet")
    problems = load_problems(str(tmp_path / "a.parquet")).problems
    assert [problem.answer for problem in problems] == ["0.1", "1000000.1", "2.5", "7"]


def test_a_printed_double_in_a_table_reads_as_a_number_would(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\na,0.10000000149011612\nb,0.30000000000000004\nc,3.14159\n")
    assert [p.answer for p in load_problems(str(tmp_path / "a.csv")).problems] == ["0.1", "0.3", "3.14159"]


# -- options ----------------------------------------------------------------------------------------------------------

ANIMALS = ["cat", "dog", "eel"]
NUMBERS = ["6", "7", "8", "9"]


def keys(folder: Path, keys: list[Any], options: Any = None, column: str = "answer", **columns: Any) -> Loaded:
    rows = [{"question": f"q{n}?", "o": options or ANIMALS, column: key} for n, key in enumerate(keys)]
    return load(
        folder, [*rows, {"question": "z?", "o": ["x", "y"], column: "A"}], choices="o", answer=column, **columns
    )


def letters(loaded: Loaded) -> list[str]:
    return [problem.answer for problem in loaded.problems][:-1]


@pytest.mark.parametrize(
    "key",
    ["B", "b", "(B)", "[B]", "B.", "B)", "B:", "Option B", "The answer is B", "the correct answer is: (b)", "**B**",
     "\\text{B}", "$B$", "B) dog", "(b) dog", "dog", "Dog", "dog.", "so it barks\n#### B", "it is \\boxed{B}", ["B"]],
)  # fmt: skip
def test_a_key_names_its_option_in_many_ways(tmp_path: Path, key: Any) -> None:
    assert letters(keys(tmp_path, [key])) == ["B"]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("D", "option D, beyond the 3 options"),
        ("E", "option E, beyond"),
        ("cow", "none of the options"),
        ("B or C", "none of the options"),
        ("A) dog", "option A with the text of option B"),
        (["A", "B"], "names 2 options"),
        (-1, "-1, counted from 0, is beyond"),
        (17, "17, counted from 0, is beyond"),
        ("17", "17, counted from 1, is beyond"),
        (True, "must be a text or a number"),
        (None, "it is null"),
    ],
)
def test_a_key_that_names_no_option_or_two_is_rejected(tmp_path: Path, key: Any, says: str) -> None:
    loaded = keys(tmp_path, ["B", key])
    assert letters(loaded) == ["B"]
    assert says in loaded.rejects[0].reason


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ([0, 1, 2], "ABC"),
        ([1, 2, 3], "ABC"),
        ([1, 2], "BC"),
        (["1", "2", "3"], "ABC"),
        (["0", "1"], "AB"),
        (["2"], "B"),
        ([1.0, 0.0], "BA"),
        (["1.0", "0.0"], "BA"),
        (["B", "3", "1"], "BCA"),
    ],
)
def test_what_numbers_mean_says_the_whole_column(tmp_path: Path, column: list[Any], found: str) -> None:
    assert letters(keys(tmp_path, column)) == list(found)


def test_numbers_are_texts_of_options_where_they_are_that(tmp_path: Path) -> None:
    assert letters(keys(tmp_path, ["7", "9", 6], NUMBERS)) == ["B", "D", "A"]
    assert letters(keys(tmp_path, ["2", "3"], NUMBERS, "answerKey")) == ["B", "C"]


def test_what_numbers_mean_does_not_depend_on_the_limit(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}?", "o": ANIMALS, "answer": n} for n in (1, 2, 3)]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_problems(f"pool={tmp_path / 'pool.jsonl'}", Columns(choices="o"), limit=2)
    assert [problem.answer for problem in loaded.problems] == ["A", "B"]


def test_numbers_that_could_count_from_either_end_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from slmreason.data import reading

    reading.log.propagate = True
    reading.log.parent.propagate = True  # type: ignore[union-attr] - a command before has set it
    keys(tmp_path, [0, 2])
    assert "nothing in column" not in caplog.text
    keys(tmp_path, [1, 2])
    assert "2 answers are numbers, and nothing in column 'answer' tells which options" in caplog.text
    assert "data.columns.answer_format index (from 0), index1 (from 1)" in caplog.text


def test_the_config_can_say_where_numbers_begin(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}?", "o": ANIMALS, "answer": n} for n in (1, "2")]
    for form, found in (("index", ["B", "C"]), ("index1", ["A", "B"])):
        loaded = load(tmp_path, rows, choices="o", answer_format=form)
        assert [problem.answer for problem in loaded.problems] == found


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"text": ["cat", "dog"], "label": ["A", "B"]}, "B"),
        ({"text": ["cat", "dog"], "label": ["1", "2"]}, "2"),
        ([{"label": "A", "text": "cat"}, {"label": "B", "text": "dog"}], "B"),
        ({"A": "cat", "B": "dog"}, "b"),
        ({"B": "dog", "A": "cat"}, "B"),
        (["A) cat", "B) dog"], "B"),
        ("a ) cat , b ) dog", "b"),
        ('["cat", "dog"]', "B"),
        ("['cat', 'dog']", "B"),
    ],
)
def test_options_are_read_in_the_forms_that_datasets_have(tmp_path: Path, options: Any, key: str) -> None:
    loaded = keys(tmp_path, [key], options)
    assert letters(loaded) == ["B"]
    assert loaded.problems[0].choices == ("cat", "dog")
    assert "A) cat B) dog" in loaded.problems[0].question


def test_a_gold_that_names_an_option_which_no_question_shows_is_rejected(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}?", "options": NUMBERS, "answer": answer} for n, answer in enumerate(["7", "B", 1, "9"])]
    loaded = load(tmp_path, rows)
    assert [problem.answer for problem in loaded.problems] == ["7", "9"]
    assert all("data.columns.choices options" in reject.reason for reject in loaded.rejects)
