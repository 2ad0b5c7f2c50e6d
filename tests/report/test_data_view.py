"""What is shown of a data set."""

from __future__ import annotations

from slmreason.data.reading import Loaded
from slmreason.records import Problem, Reject, Turn
from slmreason.report.data_view import data_view, lines
from slmreason.student import Student

ASKED = Problem("a-0", "2 + 3 = ?", "5", trace="2 + 3 = 5\n5", turns=(Turn("system", "Add."),))
PLAIN = Problem("a-1", "1 + 1 = ?", "2")


def loaded(*rejects: Reject) -> Loaded:
    return Loaded("a", (ASKED, PLAIN), rejects, {"a-0": "a.jsonl, line 1"})


def test_a_row_has_the_tokens_that_the_student_gets(student: Student) -> None:
    view = data_view("a", loaded(), student, num_rows=1)
    [row] = view.rows
    assert student.tokenizer(row.prompt, add_special_tokens=False)["input_ids"] == list(student.encode_problem(ASKED))
    assert (row.prompt_tokens, row.trace_tokens) == (
        len(student.encode_problem(ASKED)), len(student.encode_target("2 + 3 = 5\n5"))
    )  # fmt: skip
    assert view.prompt_tokens == tuple(len(student.encode_problem(problem)) for problem in (ASKED, PLAIN))


def test_reasons_are_counted_by_kind_the_commonest_first_with_their_keys(student: Student) -> None:
    rare, often = (
        "empty answer: data.columns.answer names the column",
        "prompt too long: 9 tokens, data.max_prompt_tokens is 5",
    )
    view = data_view(
        "a", loaded(Reject("x", "l 1", rare), Reject("y", "l 2", often), Reject("z", "l 3", often)), student, 0
    )
    assert [(kind.count, kind.first.id, kind.keys) for kind in view.rejects] == [
        (2, "y", ("data.max_prompt_tokens",)), (1, "x", ("data.columns.answer",))
    ]  # fmt: skip
    assert "a: 2 of 5 rows are problems, 3 are rejected" in list(lines(view))


def test_a_long_text_is_cut_and_the_prompt_is_not(student: Student) -> None:
    long = Problem("b", "word " * 1000, "2")
    shown = "\n".join(lines(data_view("b", Loaded("b", (long,)), student, 1)))
    assert "... (5000 characters)" in shown
    assert shown.count("word ") >= 1400
