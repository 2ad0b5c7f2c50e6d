"""Conversations and tables as pools."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from slmreason.data.sources import Columns, Loaded, load_problems, split_source
from slmreason.evaluate.benchmarks import short_name
from slmreason.records import Turn, problem_key

GOOD = '{"question": "1 + 1 = ?", "answer": "2"}\n'


def load(folder: Path, *rows: dict[str, Any], columns: Columns | None = None) -> Loaded:
    file = folder / "pool.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows, {"question": "good?", "answer": "1"}])))
    return load_problems(f"pool={file}", columns)


def messages(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def sharegpt(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": said} for who, said in turns], **more}


SOLUTION = "4 * 6 = 24\n#### 24"


@pytest.mark.parametrize(
    "row",
    [
        messages(("user", "How many?"), ("assistant", SOLUTION)),
        sharegpt(("human", "How many?"), ("gpt", SOLUTION)),
        messages(("user", [{"type": "text", "text": "How many?"}]), ("assistant", SOLUTION)),
        messages(("user", "How many?"), ("assistant", SOLUTION), answer="24"),
        {"messages": json.dumps(messages(("user", "How many?"), ("assistant", SOLUTION))["messages"])},
        {"messages": {"role": ["user", "assistant"], "content": ["How many?", SOLUTION]}},
        {"prompt": messages(("user", "How many?"))["messages"],
         "completion": messages(("assistant", SOLUTION))["messages"]},
    ],
)  # fmt: skip
def test_the_user_asks_and_the_assistant_solves(tmp_path: Path, row: dict[str, Any]) -> None:
    problem, _ = load(tmp_path, row).problems
    assert (problem.question, problem.answer, problem.trace) == ("How many?", "24", SOLUTION)


def test_the_conversation_may_stand_in_a_column_that_the_config_names(tmp_path: Path) -> None:
    row = {"chat": messages(("user", "How many?"), ("assistant", SOLUTION))["messages"], "gold": "24"}
    for columns in (Columns(question="chat", answer="chat"), Columns(question="chat", answer="gold", trace="chat")):
        problem = load(tmp_path, row, row, columns=columns).problems[0]
        assert (problem.question, problem.answer, problem.trace) == ("How many?", "24", SOLUTION)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (messages(("user", "a"), ("assistant", ""), ("user", "c"), ("assistant", SOLUTION)), "the assistant turn of"),
        (messages(("user", "a"), ("user", "b"), ("assistant", SOLUTION)), "2 user turns, 1 assistant turn"),
        (messages(("assistant", SOLUTION)), "1 assistant turn"),
        (messages(("assistant", "Hello!"), ("user", "How many?")), "the last is of the user"),
        (messages(("user", "How many?"), ("tool", "24"), ("assistant", SOLUTION)), "a turn of 'tool'"),
        (messages(("user", "How many?")), "no column"),
        (messages(("user", " "), ("assistant", SOLUTION)), "the user turn of the conversation is empty"),
        (messages(("user", "How many?"), ("assistant", "")), "the assistant turn of the conversation is empty"),
        (messages(("user", [{"type": "image_url"}]), ("assistant", SOLUTION)), "turn 1 of the conversation holds more"),
        (messages(("user", "How many?"), ("assistant", "There are quite a few of them.")), "is prose"),
        (messages(("user", "\ud800"), ("assistant", SOLUTION)), "half a character"),
    ],
)  # fmt: skip
def test_a_conversation_that_is_no_question_with_its_answer_is_rejected(
    tmp_path: Path, row: dict[str, Any], says: str
) -> None:
    loaded = load(tmp_path, row)
    assert [problem.question for problem in loaded.problems] == ["good?"]
    assert says in loaded.rejects[0].reason


@pytest.mark.parametrize(
    "row",
    [
        messages(("system", "Be kind."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "Times 12?"),
                 ("assistant", SOLUTION)),
        sharegpt(("system", "Be kind."), ("human", "1 + 1?"), ("gpt", "2"), ("human", "Times 12?"), ("gpt", SOLUTION)),
        sharegpt(("human", "1 + 1?"), ("gpt", "2"), ("human", "Times 12?"), ("gpt", SOLUTION), system="Be kind."),
        {"prompt": messages(("system", "Be kind."), ("user", "1 + 1?"), ("assistant", "2"),
                            ("user", "Times 12?"))["messages"], "completion": SOLUTION},
        {"instruction": "Times 12?", "input": "", "output": SOLUTION, "history": [["1 + 1?", "2"]],
         "system": "Be kind."},
    ],
)  # fmt: skip
def test_what_was_said_before_the_last_user_turn_is_kept(tmp_path: Path, row: dict[str, Any]) -> None:
    problem, _ = load(tmp_path, row).problems
    assert (problem.question, problem.answer, problem.trace) == ("Times 12?", "24", SOLUTION)
    assert problem.turns == (Turn("system", "Be kind."), Turn("user", "1 + 1?"), Turn("assistant", "2"))


@pytest.mark.parametrize("column", ["answer", "solution", "ground_truth", "completion", "target"])
def test_the_gold_of_a_prompt_list_stands_beside_it(tmp_path: Path, column: str) -> None:
    problem, _ = load(tmp_path, {"prompt": messages(("user", "How many?"))["messages"], column: "24"}).problems
    assert (problem.question, problem.answer, problem.trace) == ("How many?", "24", None)


def test_an_instruction_has_its_input_below_it_and_a_question_needs_none(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        {"instruction": "Add them.", "input": "2 and 3", "output": "5"},
        {"instruction": "What is 2 + 3?", "input": "", "output": "5"},
        {"instruction": "What is 3 + 3?", "output": "6"},
        {"instruction": "Solve it.", "problem": "4 + 4 = ?", "answer": "8"},
    )
    asked = ["Add them.\n\n2 and 3", "What is 2 + 3?", "What is 3 + 3?", "4 + 4 = ?", "good?"]
    assert [problem.question for problem in loaded.problems] == asked


def test_a_null_column_is_passed_over(tmp_path: Path) -> None:
    problem, _ = load(tmp_path, {"question": None, "problem": "4?", "answer": None, "solution": "#### 4"}).problems
    assert (problem.question, problem.answer) == ("4?", "4")


def test_the_same_question_after_another_turn_is_another_problem(tmp_path: Path) -> None:
    rows = [messages(("user", first), ("assistant", "Yes."), ("user", "How many?"), answer="3") for first in "ab"]
    alone = messages(("user", "How many?"), answer="3")
    problems = load(tmp_path, *rows, alone).problems[:3]
    assert len({problem.key for problem in problems}) == 3
    assert problems[2].key == problem_key("How many?", "3")


# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'question,answer\r\n"1, 2?\n3?",2\r\n\r\nb?,3\r\n'),
        ("A.CSV", '\ufeffquestion,answer\n"1, 2?\n3?",2\nb?,3'),
        ("a.csv", 'question;answer\n"1, 2?\n3?";2\nb?;3\n'),
        ("a.tsv", '\nquestion\tanswer\n"1, 2?\n3?"\t2\nb?\t3\n'),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_table_is_read(tmp_path: Path, name: str, text: str, packed: bool) -> None:
    file = tmp_path / (name + ".gz" if packed else name)
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    loaded = load_problems(str(file))
    assert [(problem.question, problem.answer) for problem in loaded.problems] == [("1, 2?\n3?", "2"), ("b?", "3")]
    assert loaded.rejects == ()


def test_a_bad_row_of_a_table_is_rejected_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'question,answer\n"a\n?",1\nb?\nc?,2,3\n"d" ?,4\n\xc4?,5\nf?,6\n')
    loaded = load_problems(str(file))
    assert [problem.answer for problem in loaded.problems] == ["1", "6"]
    assert [(reject.where.rpartition(" ")[2], reject.reason.partition(":")[0]) for reject in loaded.rejects] == [
        ("4", "not a row of this table"), ("5", "not a row of this table"), ("6", "not a row of a table"),
        ("7", "not UTF-8"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty, there is no row in it"),
        (b"question,answer\n", "empty, there is no row in it"),
        (b'question,answer\n"a?,1\nb?,2\n', "line 2: a quote is opened and never closed"),
        (b"question,question\na?,1\n", "two columns have the name 'question'"),
        (b"text,label\na?,1\n", "there are ['label', 'text']"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(ValueError, match="a.csv") as error:
        load_problems(str(tmp_path / "a.csv"))
    assert says in str(error.value)


# -- names of files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["split=train/part-0.jsonl", "k=v.jsonl", "x.JSONL", "x.JSON", "x.Jsonl.GZ"])
def test_a_file_is_found_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    text = f"[{GOOD}]" if name == "x.JSON" else GOOD
    file.write_bytes(gzip.compress(text.encode()) if name.endswith("GZ") else text.encode())
    monkeypatch.chdir(tmp_path)
    for source in (str(file), name, f"./{name}", f"pool={name}", f"svamp-like={name}"):
        assert [problem.answer for problem in load_problems(source).problems] == ["2"], source


@pytest.mark.parametrize(
    ("source", "parts", "short"),
    [
        ("gsm8k=d/x=1/a.jsonl", ("gsm8k", "d/x=1/a.jsonl"), "gsm8k"),
        ("openai/gsm8k=train.jsonl", ("openai/gsm8k", "train.jsonl"), "openai/gsm8k"),
        ("pool=/a/b.jsonl", ("pool", "/a/b.jsonl"), "pool"),
        ("d/split=train/a.jsonl", ("d/split=train/a.jsonl", ""), "a"),
        ("embedded:chain/train?count=3", ("embedded:chain/train?count=3", ""), "chain"),
    ],
)
def test_a_name_before_a_file_is_told_from_a_path(source: str, parts: tuple[str, str], short: str) -> None:
    assert split_source(source) == parts
    assert short_name(source) == short


def test_a_file_whose_name_is_not_utf_8_is_read_and_named_in_what_is_written(tmp_path: Path) -> None:
    file = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    Path(file).write_text(GOOD + "{}\n")
    loaded = load_problems(file)
    [problem], [reject] = loaded.problems, loaded.rejects
    for text in (problem.id, problem.source, reject.id, reject.where, *loaded.places.values()):
        assert r"caf\xe9.jsonl" in text
        text.encode()
