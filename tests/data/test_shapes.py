"""Every shape of a row in every kind of file gives the same problem, and no text in a row can break the reader."""

from __future__ import annotations

import csv
import io
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmreason.data.sources import Columns, load_problems

QUESTION = 'Ann says "1, 2".\nHow many\tare left; or 3?'
SOLUTION = "4 * 6 = 24\n#### 24"
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": SOLUTION}
SHAPES: dict[str, tuple[dict[str, Any], Columns | None]] = {
    "question and answer": ({"question": QUESTION, "answer": SOLUTION}, None),
    "columns of their own": ({"Text ": QUESTION, "lösung": SOLUTION}, Columns(question="Text |Text", answer="lösung")),
    "messages": ({"messages": [USER, ASSISTANT]}, None),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": SOLUTION}]}, None
    ),
    "a prompt list with its answer": ({"prompt": [USER], "answer": SOLUTION}, None),
    "a prompt list with its completion": ({"prompt": [USER], "completion": [ASSISTANT]}, None),
    "a prompt with its completion": ({"prompt": QUESTION, "completion": SOLUTION}, None),
    "Alpaca": ({"instruction": QUESTION, "input": "", "output": SOLUTION}, None),
}  # fmt: skip


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """As a spreadsheet or pandas writes it: a byte order mark, quotes where they are needed, lists as Python's text."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if path.suffix == ".tsv" else ",")
    writer.writerow(rows[0])
    writer.writerows([[cell if isinstance(cell, str) else repr(cell) for cell in row.values()] for row in rows])
    path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())


WRITERS = {
    "a.jsonl": write_jsonl, "lines.json": write_jsonl, "a.json": write_json, "a.parquet": write_parquet,
    "a.csv": write_table, "a.tsv": write_table,
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WRITERS)
def test_every_shape_is_read_from_every_kind_of_file(tmp_path: Path, name: str, shape: str) -> None:
    row, columns = SHAPES[shape]
    WRITERS[name](tmp_path / name, [row, row])
    loaded = load_problems(str(tmp_path / name), columns)
    assert loaded.rejects == ()
    found = {(problem.question, problem.answer, problem.trace) for problem in loaded.problems}
    assert found == {(QUESTION, "24", SOLUTION)}
    assert len(loaded.problems) == 2


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"text": "1?", "answer": "2"}, "data.columns.question"),
        ({"question": 7, "answer": "2"}, "data.columns.question"),
        ({"question": "1?", "label": "2"}, "data.columns.answer"),
        ({"question": "1?", "answer": ""}, "data.columns.answer"),
        ({"question": "1?", "answer": "There are quite a few of them."}, "data.columns.answer_format"),
        ({"messages": [USER, USER]}, "data.columns.question"),
        ({"prompt": [USER], "solution": [USER]}, "data.columns.answer"),
    ],
)
def test_a_reason_names_the_key_to_change_and_each_row_is_counted_once(
    tmp_path: Path, row: dict[str, Any], key: str
) -> None:
    good = {"question": "1 + 1 = ?", "answer": "2"}
    write_jsonl(tmp_path / "a.jsonl", [good, row, good])
    loaded = load_problems(str(tmp_path / "a.jsonl"))
    assert [reject.where for reject in loaded.rejects] == [f"{tmp_path / 'a.jsonl'}, line 2"]
    assert key in loaded.rejects[0].reason
    assert len(loaded.problems) == 2
    write_jsonl(tmp_path / "b.jsonl", [row])
    with pytest.raises(ValueError, match=key):
        load_problems(str(tmp_path / "b.jsonl"))


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
VALUE: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "text"]), inner, max_size=3
    ),
    max_leaves=6,
)  # fmt: skip
ROLE = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "User"])
TURN = st.fixed_dictionaries({"role": ROLE, "content": TEXT | VALUE})
NAMES = ["question", "problem", "prompt", "answer", "solution", "completion", "messages", "conversations",
         "instruction", "input", "output", "history", "system"]  # fmt: skip
ROW = st.dictionaries(st.sampled_from(NAMES), VALUE | TEXT | st.lists(TURN, max_size=4), max_size=6)


@given(rows=st.lists(ROW, max_size=5))
@settings(deadline=None, max_examples=150)
def test_a_row_becomes_a_problem_or_a_reject_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    write_jsonl(file, [{"question": "1 + 1 = ?", "answer": "2"}, *rows])
    loaded = load_problems(f"pool={file}")
    places = [*loaded.places.values(), *(reject.where for reject in loaded.rejects)]
    assert sorted(places, key=lambda where: int(where.rpartition(" ")[2])) == [
        f"{file}, line {number}" for number in range(1, len(rows) + 2)
    ]
    for problem in loaded.problems:
        assert problem.question.strip() == problem.question != ""
        assert problem.answer
        assert all(turn.text for turn in problem.turns)


CELL = st.text(st.sampled_from(string.ascii_letters + string.digits + "\"\n\t,;' "), max_size=12)


@given(
    cells=st.lists(st.tuples(CELL, st.integers(0, 99)), min_size=1, max_size=6), suffix=st.sampled_from(["csv", "tsv"])
)
@settings(deadline=None, max_examples=150)
def test_a_table_gives_back_what_was_written_whatever_its_cells_hold(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, int]], suffix: str
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / f"a.{suffix}"
    rows = [{"question": f"q {cell}", "answer": str(number)} for cell, number in cells]
    write_table(file, rows)
    read = [(problem.question, problem.answer) for problem in load_problems(str(file)).problems]
    assert read == [(row["question"].strip(), row["answer"]) for row in rows]


@given(data=st.binary(max_size=60), suffix=st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]))
@settings(deadline=None, max_examples=150)
def test_bytes_of_any_kind_are_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / f"a.{suffix}"
    file.write_bytes(data)
    try:
        assert load_problems(str(file)).problems
    except ValueError as error:
        said = str(error)
    else:
        said = str(file)
    assert f"a.{suffix}" in said
