"""Bad input by the one rule of `slmreason.data.sources`: a bad row is rejected, an unreadable file is refused."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmreason.cli import main
from slmreason.data.evidence import read_evidence
from slmreason.data.ledger import HarvestRow, Ledger, given_harvest
from slmreason.data.recorded import read_recorded
from slmreason.data.sources import Columns, load_problems, most_common
from slmreason.records import (
    BridgeCandidate,
    BridgeResult,
    Critique,
    Diagnosis,
    Place,
    Problem,
    Rollout,
    RolloutGroup,
    Trace,
    to_json,
)
from slmreason.run.files import read_records
from tests.runs import SMALL, Run

FIT = ["fit", *SMALL, "--teacher=null", "--curriculum.stages=[sft]", "--curriculum.probe.attempts=1", "--sft.epochs=1",
       "--benchmarks=[embedded:chain/test?count=1]"]  # fmt: skip
GOOD = b'{"question": "1 + 1 = ?", "answer": "2"}'
DEEP = b"[" * 100_000 + b"]" * 100_000
DIGITS = b"1" * 10_000


def row(**columns: Any) -> bytes:
    """A row with these columns in place of the good ones; `...` takes one away."""
    whole = {"question": "1 + 2 = ?", "answer": "3"} | columns
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


def with_raw(column: str, value: bytes) -> bytes:
    """A row with a value that `json.dumps` would not write."""
    return row(**{column: "HERE"}).replace(b'"HERE"', value)


QUESTION, ANSWER = Columns.question, Columns.answer
BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "no question": (row(question=...), f"no column {QUESTION!r}: there are ['answer']"),
    "no answer": (row(answer=...), f"no column {ANSWER!r}: there are ['question']"),
    "nothing": (b"{}", f"no column {QUESTION!r}: there are []"),
    "empty question": (row(question=""), f"column {QUESTION!r} is empty"),
    "blank question": (row(question=" \n\t"), f"column {QUESTION!r} is empty"),
    "empty answer": (row(answer=""), "empty answer"),
    "blank answer": (row(answer=" \n"), "empty answer"),
    "empty list of answers": (row(answer=[]), "empty answer"),
    "nothing after the marks": (row(answer="1 + 2 = 3 ####"), "empty answer"),
    "nothing in the box": (row(answer=r"\boxed{}"), "the box in the answer cannot be read: it is empty"),
    "null question": (row(question=None), f"column {QUESTION!r} must be a text: it is null"),
    "null answer": (row(answer=None), "answer must be a text or a number: it is null"),
    "number for a question": (row(question=7), f"column {QUESTION!r} must be a text: it is a number"),
    "list for a question": (row(question=["1 + 2"]), f"column {QUESTION!r} must be a text: it is a list"),
    "object for a question": (row(question={"text": "q"}), f"column {QUESTION!r} must be a text: it is an object"),
    "true for a question": (row(question=True), f"column {QUESTION!r} must be a text: it is true or false"),
    "true for an answer": (row(answer=True), "answer must be a text or a number: it is true or false"),
    "object for an answer": (row(answer={"value": 3}), "answer must be a text or a number: it is an object"),
    "null in a list of answers": (row(answer=["3", None]), "answer must be a text or a number: it is null"),
    "list in a list of answers": (row(answer=[["3"]]), "answer must be a text or a number: it is a list"),
    "NaN": (row(answer=float("nan")), "answer must be finite: it is nan"),
    "Infinity": (row(answer=float("-inf")), "answer must be finite: it is -inf"),
    "too large for a float": (with_raw("answer", b"1e999"), "answer must be finite: it is inf"),
    "broken JSON": (b'{"question": "1 + 2", "answer', "not JSON: Unterminated string starting at column 23"),
    "a tab within a text": (b'{"question": "1\t2"}', "not JSON: Invalid control character at column 16"),
    "two rows in a line": (GOOD + GOOD, f"not JSON: Extra data at column {len(GOOD) + 1}"),
    "no JSON": (b"question,answer", "not JSON: Expecting value at column 1"),
    "a list": (b'["1 + 2", "3"]', "a row must be an object: it is a list"),
    "a number": (b"3", "a row must be an object: it is a number"),
    "null": (b"null", "a row must be an object: it is null"),
    "nested too deeply": (DEEP, "cannot be read as JSON: "),
    "an answer nested too deeply": (with_raw("answer", DEEP), "cannot be read as JSON: "),
    "too many digits": (with_raw("answer", DIGITS), "cannot be read as JSON: Exceeds the limit"),
    "half a character in a question": (
        with_raw("question", rb'"1 \ud800"'), f"column {QUESTION!r} holds half a character (a lone surrogate) at"
    ),
    "half a character in an answer": (
        with_raw("answer", rb'"\udfff"'), "answer holds half a character (a lone surrogate) at position 1"
    ),
    "half a character in a column's name": (
        rb'{"\ud800": 1}', f"no column {QUESTION!r}: there are ['\\ud800']"
    ),
    "not UTF-8": (row(question="HERE").replace(b"HERE", b"\xff\xfe"), "not UTF-8: invalid start byte at byte 15"),
    "Latin-1": (row(question="HERE").replace(b"HERE", "Äpfel?".encode("latin-1")), "not UTF-8: "),
}  # fmt: skip
"""A line of a pool, and how the reason begins against it."""


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "at the end"])
def test_a_bad_row_is_set_aside_with_its_line_and_the_others_are_kept(tmp_path: Path, name: str, last: bool) -> None:
    bad, reason = BAD_ROWS[name]
    file = tmp_path / "pool.jsonl"
    file.write_bytes(b"\n".join([GOOD, b"", bad] + ([] if last else [GOOD, b""])))
    loaded = load_problems(f"pool={file}")
    assert [problem.id for problem in loaded.problems] == ["pool-000000"] + ([] if last else ["pool-000002"])
    [reject] = loaded.rejects
    assert (reject.id, reject.where) == ("pool-000001", f"{file}, line 3")
    assert reject.reason.startswith(reason), reject.reason
    assert len(reject.reason) <= 500
    json.dumps(to_json(reject), ensure_ascii=False).encode()


def test_the_command_goes_on_without_bad_rows_and_writes_down_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    long = row(question="1 + 2 " * 50_000)  # every word is a token or more
    Path("pool.jsonl").write_bytes(b"\n".join([GOOD, *(bad for bad, _ in BAD_ROWS.values()), long]) + b"\n")
    Path("held.jsonl").write_bytes(b"\n".join([row(), long, row(answer=None)]) + b"\n")
    args = [*FIT, "--data.train=pool.jsonl", "--benchmarks=[held=held.jsonl]", "--run_dir=run"]
    assert main(args) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"pool: 1 problems from pool.jsonl, {len(BAD_ROWS) + 1} rejected: " in shown
    assert "benchmark held=held.jsonl: 2 rows are rejected: answer must be a text or a number (1, first held" in shown
    rejects = Run(Path("run"), "").rows("rejects.jsonl")
    *bad_rows, too_long, null, no_room = rejects
    assert [reject["where"] for reject in bad_rows] == [f"pool.jsonl, line {n}" for n in range(2, len(BAD_ROWS) + 2)]
    for reject, (_, reason) in zip(bad_rows, BAD_ROWS.values(), strict=True):
        assert reject["reason"].startswith(reason)
        assert reject["id"]
    assert too_long["where"] == f"pool.jsonl, line {len(BAD_ROWS) + 2}"
    tokens = re.fullmatch(r"prompt too long: (\d+) tokens, data.max_prompt_tokens is \d+", too_long["reason"])
    assert tokens is not None
    assert int(tokens[1]) > 100_000
    assert (no_room["where"], null["where"]) == ("held.jsonl, line 2", "held.jsonl, line 3")
    assert re.fullmatch(
        rf"prompt too long: {tokens[1]} tokens, the student's \d+ positions less evaluation.max_new_tokens leave \d+",
        no_room["reason"],
    )


def test_the_first_of_two_rows_with_one_id_is_kept_and_the_second_names_it(tmp_path: Path) -> None:
    file = tmp_path / "pool.jsonl"
    file.write_bytes(
        b"\n".join([row(id="a"), row(id="b", answer="4"), row(id="a", answer="5"), row(id=1), row(id="1")])
    )
    loaded = load_problems(f"pool={file}", Columns(id="id"))
    assert [(problem.id, problem.answer) for problem in loaded.problems] == [("a", "3"), ("b", "4"), ("1", "3")]
    assert [(reject.id, reject.where, reject.reason) for reject in loaded.rejects] == [
        ("a", f"{file}, line 3", f"the id stands twice: {file}, line 1 has it too, and is kept"),
        ("1", f"{file}, line 5", f"the id stands twice: {file}, line 4 has it too, and is kept"),
    ]


@pytest.mark.parametrize(
    ("columns", "bad", "reason"),
    [
        (Columns(id="id"), row(), "no column 'id': there are ['answer', 'question']"),
        (Columns(id="id"), row(id=""), "column 'id' is empty"),
        (Columns(id="id"), row(id=None), "column 'id' must be a text or a number: it is null"),
        (Columns(trace="t"), row(t=3), "column 't' must be a text: it is a number"),
        (Columns(question="{q} {w}"), row(q="a"), "no column 'w': there are ['answer', 'q', 'question']"),
        (Columns(question="{q} {w}"), row(q="", w=" "), "column '{q} {w}' is empty"),
        (Columns(question="{q} {w}"), row(q="a", w=None), "column 'w' must be a text or a number: it is null"),
        (Columns(answer_format="hash"), row(), "no `####` in the answer"),
        (Columns(answer_format="boxed"), row(), r"no \boxed{} in the answer"),
        (Columns(choices="c", answer_format="index"), row(c=["a"], answer=1), "answer is not the position of an"),
        (Columns(choices="c", answer_format="index"), row(c=["a"], answer=-1), "answer is not the position of an"),
        (Columns(choices="c", answer_format="index"), row(c=["a"], answer=False), "answer is not the position of an"),
        (Columns(choices="c"), row(c="ab"), "column 'c' must be a list of option texts"),
        (Columns(choices="c"), row(c=[]), "column 'c' must be a list of option texts"),
        (Columns(choices="c"), row(c=["a", 1]), "column 'c' must be a list of option texts"),
        (Columns(choices="c"), with_raw("c", rb'["\ud800"]'), "column 'c' holds half a character"),
        (Columns(any_order="o"), row(o="yes"), "column 'o' must be true or false, not 'yes'"),
        (Columns(any_order="o"), row(o=None), "column 'o' must be true or false, not None"),
        (Columns(tolerance="e"), row(e=True), "column 'e' must be a number or empty, not True"),
        (Columns(tolerance="e"), row(e=[0.1]), "column 'e' must be a number or empty, not [0.1]"),
        (Columns(tolerance="e"), row(e="-1"), "column 'e' must be 0 or more, not '-1'"),
        (Columns(tolerance="e"), row(e=float("inf")), "column 'e' must be a number or empty, not inf"),
        (Columns(tolerance="e"), with_raw("e", b"1" * 400), "column 'e' must be "),
        (
            Columns(tolerance="e"),
            with_raw("e", b"[" * 900 + b"]" * 900),
            "column 'e' must be a number or empty, not [[",
        ),
    ],
)
def test_a_column_that_is_wrong_is_named(tmp_path: Path, columns: Columns, bad: bytes, reason: str) -> None:
    file = tmp_path / "pool.jsonl"
    file.write_bytes(row(id="a", t="so 3", q="a", w="b", c=["a"], o=True, e="") + b"\n" + bad)
    said = reasons(file, columns)
    assert reason in said
    assert f"{file}, line" in said


def reasons(file: Path, columns: Columns) -> str:
    """What is said against the bad rows, also where none is good: a format is asked of the good row too."""
    try:
        rejects = load_problems(f"pool={file}", columns).rejects
    except ValueError as error:
        return str(error)
    return "; ".join(f"{reject.where}: {reject.reason}" for reject in rejects)


WHOLE: dict[str, tuple[str, bytes]] = {
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\n" + row()),
    "a byte order mark in JSON": ("a.json", b"\xef\xbb\xbf[" + GOOD + b"," + row() + b"]"),
    "Windows line ends": ("a.jsonl", GOOD + b"\r\n" + row() + b"\r\n"),
    "blank lines": ("a.jsonl", b"\n\n" + GOOD + b"\n \t\n\r\n" + row() + b"\n\n\n"),
    "no line end": ("a.jsonl", GOOD + b"\n" + row()),
    "JSON over many lines": ("a.json", b"[\r\n" + GOOD + b",\r\n" + row() + b"\r\n]\r\n"),
    "two gzips in one": ("a.jsonl.gz", gzip.compress(GOOD + b"\n") + gzip.compress(row() + b"\n")),
    "JSONL named .json": ("a.json", GOOD + b"\n" + row()),
    "another suffix": ("a.data", GOOD + b"\n" + row()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_merely_unusual_is_read(tmp_path: Path, name: str) -> None:
    file = tmp_path / WHOLE[name][0]
    file.write_bytes(WHOLE[name][1])
    loaded = load_problems(str(file))
    assert [problem.answer for problem in loaded.problems] == ["2", "3"]
    assert loaded.rejects == ()


def parquet(**columns: Any) -> Callable[[Path], object]:
    def write(file: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), file)

    return write


def half_a_parquet(file: Path) -> None:
    parquet(question=["q"] * 99, answer=["1"] * 99)(file)
    file.write_bytes(file.read_bytes()[:-40])


ROWS = b"".join(b'{"question": "%d + 1 = ?", "answer": "%d"}\n' % (n, n + 1) for n in range(5000))
GZIP = gzip.compress(ROWS)
REFUSED: dict[str, tuple[str, bytes | Callable[[Path], object] | None, str]] = {
    "a missing file": ("a.jsonl", None, "a.jsonl: no such file"),
    "a missing Parquet file": ("a.parquet", None, "a.parquet: no such file"),
    "a folder": ("a.jsonl", Path.mkdir, "a.jsonl: a folder, not a file"),
    "an empty file": ("a.jsonl", b"", "a.jsonl: empty, there is no row in it"),
    "blank lines alone": ("a.jsonl", b"\n \r\n", "a.jsonl: empty, there is no row in it"),
    "an empty gzip": ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz: empty, there is no row in it"),
    "a gzip of no bytes": ("a.jsonl.gz", b"", "a.jsonl.gz: empty, there is no row in it"),
    "text named .gz": ("a.jsonl.gz", GOOD, "a.jsonl.gz: cannot be read past line 0 (Not a gzipped file"),
    "a gzip that is cut off": ("a.jsonl.gz", GZIP[: len(GZIP) // 2], "a.jsonl.gz: cannot be read past line "),
    "a gzip without its end": ("a.jsonl.gz", GZIP[:-8], "a.jsonl.gz: cannot be read past line 5000 (Compressed file"),
    "a broken gzip": ("a.jsonl.gz", GZIP[:2000] + b"\0" * 99 + GZIP[2099:], "a.jsonl.gz: cannot be read past line "),
    "a gzip with a wrong sum": ("a.jsonl.gz", GZIP[:-8] + b"\0" * 8, "a.jsonl.gz: cannot be read past line 5000 (CRC"),
    "a gzip with a tail": ("a.jsonl.gz", GZIP + b"tail", "a.jsonl.gz: cannot be read past line 5000 (Not a gzipped"),
    "JSON that is cut off in a gzip": ("a.json.gz", GZIP[:-8], "a.json.gz: cannot be read to its end (Compressed"),
    "an object": ("a.json", GOOD, "a.json: must hold a list of objects, not one dict; JSONL is named .jsonl"),
    "an empty list": ("a.json", b"[]", "a.json: empty, there is no row in it"),
    "an empty JSON file": ("a.json", b"", "a.json, line 1: not JSON (Expecting value)"),
    "JSON broken at line 3": ("a.json", b"[\n" + GOOD + b"\n" + GOOD + b"]", "a.json, line 3: not JSON (Expecting ','"),
    "something behind JSON": ("a.json", b"[" + GOOD + b"]\n" + GOOD, "a.json, line 2: not JSON (Extra data)"),
    "JSON nested too deeply": ("a.json", b"[" + DEEP + b"]", "a.json: cannot be read as JSON (maximum recursion"),
    "JSON with too many digits": ("a.json", b"[" + DIGITS + b"]", "a.json: cannot be read as JSON (Exceeds the limit"),
    "JSON that is not UTF-8": ("a.json", b"[\n" + GOOD + b",\n\xff]", "a.json, line 3: not UTF-8 (invalid start byte)"),
    "no Parquet": ("a.parquet", b"PAR1 but no more", "a.parquet: cannot be read as Parquet ("),
    "half a Parquet file": ("a.parquet", half_a_parquet, "a.parquet: cannot be read as Parquet ("),
    "an empty Parquet file": ("a.parquet", b"", "a.parquet: cannot be read as Parquet ("),
    "a Parquet file without rows": (
        "a.parquet", parquet(question=[], answer=[]), "a.parquet: empty, there is no row in it"
    ),
    "Parquet with other columns": (
        "a.parquet", parquet(text=["a", "b"], label=[1, 2]),
        "a.parquet: no usable problem; all 2 rows are bad, the first in {file}, row 1: "
        f"no column {QUESTION!r}: there are ['label', 'text']",
    ),
    "a table under another name": (
        "a.data", b"question,answer\n1 + 1,2\n",
        "a.data: no usable problem; all 2 rows are bad, the first in {file}, line 1: not JSON: Expecting value",
    ),
    "UTF-16": (
        "a.jsonl", (GOOD + b"\n").decode().encode("utf-16"),
        "a.jsonl: no usable problem; all 2 rows are bad, the first in {file}, line 1: not UTF-8",
    ),
    "bad rows alone": (
        "a.jsonl", b"\n".join(bad for bad, _ in BAD_ROWS.values()),
        f"a.jsonl: no usable problem; all {len(BAD_ROWS)} rows are bad, the first in {{file}}, line 1: no column",
    ),
}  # fmt: skip
"""A file by its name and what is in it, and what the error says."""


def refused_file(folder: Path, name: str) -> tuple[Path, str]:
    file, content = folder / REFUSED[name][0], REFUSED[name][1]
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        content(file)
    return file, REFUSED[name][2].replace("{file}", str(file))


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_to_its_end_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file, says = refused_file(tmp_path, name)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}{os.sep}{says}")):
        load_problems(str(file))
    if "past line" not in says:
        with pytest.raises(ValueError, match=re.escape(says.partition(": no usable")[0])):
            load_problems(f"gsm8k={file}")


@pytest.mark.parametrize(
    "name",
    ["a missing file", "a folder", "an empty file", "a gzip that is cut off", "text named .gz", "JSON broken at line 3",
     "an object", "half a Parquet file", "Parquet with other columns", "bad rows alone"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["--data.train={}", "--benchmarks=[bench={}]"])
def test_the_command_refuses_such_a_file_with_one_message_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file, says = refused_file(tmp_path, name)
    assert main([*FIT, key.format(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert "Traceback" not in error
    assert not Path("runs").exists()


NOBODYS = "nobody-at-all/nothing"
"""On no hub, and the tests are offline."""


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        (f"--student.model={NOBODYS}", f"student.model: cannot load '{NOBODYS}': "),
        (f"--data.train={NOBODYS}", f"data.train: {NOBODYS}: neither a local file nor a dataset that the hub gave ("),
        (f"--data.train=[embedded:chain/train?count=2, {NOBODYS}]", f"data.train: {NOBODYS}: neither a local file"),
        (f"--data.validation={NOBODYS}", f"data.validation: {NOBODYS}: neither a local file"),
        (f"--benchmarks=[embedded:chain/test?count=1, {NOBODYS}]", f"benchmarks: {NOBODYS}: neither a local file"),
    ],
)
def test_what_the_hub_does_not_give_is_refused_in_a_line_with_its_key_before_anything_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arg: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, arg]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says}")
    assert not Path("runs").exists()


def test_the_command_refuses_a_folder_without_a_suffix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pool").mkdir()
    assert main([*FIT, f"--data.train={tmp_path / 'pool'}"]) == 2
    assert str(tmp_path / "pool") in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(GOOD)
    file.chmod(0)
    with pytest.raises(ValueError, match=f"{name}: cannot be read .*Permission denied"):
        load_problems(str(file))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_a_file_that_the_system_does_not_let_us_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As the test above, also for root: the file is there, and opening it fails."""
    import builtins

    import pyarrow.parquet

    def denied(file: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(file))

    (tmp_path / name).write_bytes(GOOD)
    monkeypatch.setattr(builtins, "open", denied)
    monkeypatch.setattr(pyarrow.parquet, "read_table", denied)
    with pytest.raises(ValueError, match=f"{name}: cannot be read .*Permission denied"):
        load_problems(str(tmp_path / name))


@pytest.mark.parametrize("column", ["{question", "question}", "{a} {b", "}{", "{{a}}"])
def test_braces_that_do_not_pair_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], column: str
) -> None:
    with pytest.raises(ValueError, match=r"data.columns.question: the braces of .* do not pair; a column is \{name\}"):
        Columns(question=column)
    monkeypatch.chdir(tmp_path)
    Path("columns.yaml").write_text(json.dumps({"data": {"columns": {"question": column}}}))
    Path("pool.jsonl").write_bytes(GOOD)
    assert main([*FIT, "--config=columns.yaml", "--data.train=pool.jsonl"]) == 2
    assert "do not pair" in capsys.readouterr().err


def test_nothing_is_lost_whatever_is_spoiled(tmp_path: Path) -> None:
    """For any rows and any of them spoiled: each is a problem or a reject, in order, and at its own line."""
    rng = random.Random(0)
    bad = [line for line, _ in BAD_ROWS.values() if len(line) < 10_000]
    for turn in range(150):
        spoiled = [rng.random() < 0.3 for _ in range(rng.randint(1, 30))]
        if all(spoiled):
            continue
        lines, numbers = [], []
        for number, is_bad in enumerate(spoiled):
            lines += [rng.choice([b"", b" ", b"\r"]) for _ in range(rng.randint(0, 2))]  # blank lines are no rows
            lines.append(rng.choice(bad) if is_bad else row(question=f"{number} + 1 = ?", answer=number + 1))
            numbers.append(len(lines))
        content = rng.choice([b"\n", b"\r\n"]).join(lines) + rng.choice([b"", b"\n"])
        file = tmp_path / f"{turn}.jsonl{rng.choice(['', '.gz'])}"
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
        loaded = load_problems(str(file))
        assert len(loaded.problems) + len(loaded.rejects) == len(spoiled)
        kept = [n for n, is_bad in enumerate(spoiled) if not is_bad]
        assert [problem.answer for problem in loaded.problems] == [str(n + 1) for n in kept]
        assert [loaded.places[p.id] for p in loaded.problems] == [f"{file}, line {numbers[n]}" for n in kept]
        aside = [numbers[n] for n, is_bad in enumerate(spoiled) if is_bad]
        assert [reject.where for reject in loaded.rejects] == [f"{file}, line {number}" for number in aside]
        # A byte anywhere may be wrong: still each row is one or the other, or the file is refused.
        data = bytearray(content)
        data[rng.randrange(len(data))] = rng.randrange(256)
        file = tmp_path / f"{turn}-flipped.jsonl"
        file.write_bytes(data)
        rows = sum(bool(line.strip()) for line in bytes(data).split(b"\n"))
        try:
            flipped = load_problems(str(file))
        except ValueError as error:  # the only good row was hit
            said = str(error)
        else:
            said = f"all {len(flipped.problems) + len(flipped.rejects)} rows"
        assert f"all {rows} rows" in said


def test_the_commonest_reasons_are_counted_with_where_each_is_first(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b"\n".join([GOOD, row(answer=""), b"1", b"{", row(answer=" "), row(id=1, answer=True), b"{", b"{"])
    )
    said = most_common(load_problems(str(file)).rejects)
    assert said.startswith(f"not JSON (3, first {file}, line 4); empty answer (2, first {file}, line 2); a row must")
    assert said.endswith("; ...")


# -- what slmreason wrote itself, and a person edited -----------------------------------------------------------------

PROBLEM = Problem("p", "1 + 1 = ?", "2", choices=("1", "2"))
FAILED = Rollout((1, 2), (3, 4), (-0.5, -0.25), "text", 0.0, False, False, 0)
TRACE = Trace("p", "The answer is \\boxed{2}.", "teacher")
WRITTEN: dict[str, tuple[dict[str, Any], Callable[[Path], object]]] = {
    "evidence": (
        {"problem_id": "p", "band": "hard", "attempts": 4, "successes": 1, "solution": "s", "question": "q"},
        read_evidence,
    ),
    "traces": (
        to_json(BridgeResult(PROBLEM, (BridgeCandidate(TRACE, None, 1),), TRACE, "hard")),
        lambda path: read_records(path, BridgeResult),
    ),
    "critiques": (
        to_json(Critique(PROBLEM, "1 + 1 = 3", Diagnosis(0, "It is 2."), "", "2", None, ("new_trace: no",))),
        lambda path: read_records(path, Critique),
    ),
    "harvest": (to_json(HarvestRow(Place(1, "grpo"), RolloutGroup(PROBLEM, (FAILED, FAILED)))), given_harvest),
}
EDITS: list[tuple[str, str, Any, str]] = [
    ("evidence", "problem_id", ..., "missing fields ['problem_id']"),
    ("evidence", "problem_id", 7, "problem_id must be a text, not 7"),
    ("evidence", "attempts", "4", "attempts must be a whole number, not '4'"),
    ("evidence", "attempts", True, "attempts must be a whole number, not True"),
    ("evidence", "attempts", 0, "1 successes of 0 attempts cannot be"),
    ("evidence", "successes", 1.0, "successes must be a whole number, not 1.0"),
    ("evidence", "successes", None, "successes must be a whole number, not None"),
    ("evidence", "successes", 5, "5 successes of 4 attempts cannot be"),
    ("evidence", "successes", -1, "-1 successes of 4 attempts cannot be"),
    ("evidence", "solution", ["s"], "solution must be a text, not ['s']"),
    ("evidence", "solution", "\ud800", "solution holds half a character"),
    ("traces", "problem", ..., "BridgeResult: unknown fields [], missing fields ['problem']"),
    ("traces", "problem", "p", "Problem must be an object, not 'p'"),
    ("traces", "problem.answer", 2, "Problem: answer must be a text, not 2"),
    ("traces", "problem.anwser", "2", "Problem: unknown fields ['anwser']"),
    ("traces", "problem.choices", ["1", 2], "Problem: choices must be a text, not 2"),
    ("traces", "problem.choices", ["1", "\ud800"], "Problem: choices holds half a character"),
    ("traces", "problem.choices", "12", "Problem: choices must be a list, not '12'"),
    ("traces", "chosen.text", None, "Trace: text must be a text, not None"),
    (
        "traces",
        "chosen.provenance",
        "me",
        "Trace: provenance must be one of teacher, bridged, handover, rationalised, self",
    ),
    ("traces", "chosen.learnability", {"mean_nll": 1}, "Learnability: unknown fields [], missing fields ["),
    ("traces", "candidates", {}, "BridgeResult: candidates must be a list, not {}"),
    ("traces", "band", "easy", "BridgeResult: band must be one of simple, medium, hard, not 'easy'"),
    ("critiques", "attempt", ["a"], "Critique: attempt must be a text, not ['a']"),
    ("critiques", "diagnosis.explanation", 3, "Diagnosis: explanation must be a text, not 3"),
    ("critiques", "note", "mine", "Critique: unknown fields ['note']"),
    ("critiques", "rejected", ["\udfff"], "Critique: rejected holds half a character"),
    ("harvest", "group.rollouts", [], "problem p: not a group whose rollouts all failed"),
    ("harvest", "group", ..., "HarvestRow: unknown fields [], missing fields ['group']"),
    ("harvest", "place.round", "1", "Place: round must be a whole number, not '1'"),
    ("harvest", "group.problem.id", None, "Problem: id must be a text, not None"),
]
"""The file, the field by its path, what a person put there, and what is said of it."""


def edited(content: dict[str, Any], path: str, value: Any) -> bytes:
    content = json.loads(json.dumps(content))
    *parents, last = path.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_slmreason_wrote_is_read_back(tmp_path: Path, kind: str) -> None:
    content, read = WRITTEN[kind]
    file = tmp_path / "a.jsonl"
    line = json.dumps(content).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)  # as an editor may have saved it
    found = read(file)
    assert isinstance(found, list)
    assert len(found) == 2


@pytest.mark.parametrize(("kind", "field", "value", "says"), EDITS)
def test_a_wrong_edit_is_refused_by_file_line_and_field(
    tmp_path: Path, kind: str, field: str, value: Any, says: str
) -> None:
    content, read = WRITTEN[kind]
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(content).encode() + b"\n\n" + edited(content, field, value) + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 3: ") + ".*" + re.escape(says)):
        read(file)


def test_a_rollout_that_is_right_or_wrong_in_a_field_is_no_harvest(tmp_path: Path) -> None:
    content = WRITTEN["harvest"][0]
    for field, value, says in [
        ("correct", True, "not a group whose rollouts all failed"),
        ("correct", 0, "Rollout: correct must be true or false, not 0"),
        ("completion_ids", [1, "2"], "Rollout: completion_ids must be a whole number, not '2'"),
        ("completion_ids", [1, True], "Rollout: completion_ids must be a whole number, not True"),
        ("reward", "0", "Rollout: reward must be a number, not '0'"),
    ]:
        bad = json.loads(json.dumps(content))
        bad["group"]["rollouts"][1][field] = value
        (tmp_path / "a.jsonl").write_text(json.dumps(content) + "\n" + json.dumps(bad))
        with pytest.raises(ValueError, match=re.escape("a.jsonl, line 2: ") + ".*" + re.escape(says)):
            given_harvest(tmp_path / "a.jsonl")


BAD_LINES = {
    "broken": (b'{"problem', "not JSON: Unterminated string"),
    "list": (b"[1]", "must be an object, not [1]"),
    "number": (b"7", "must be an object, not 7"),
    "deep": (DEEP, "cannot be read as JSON: "),
    "digits": (b'{"a": ' + DIGITS + b"}", "cannot be read as JSON: Exceeds the limit"),
    "bytes": (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 8"),
}


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_row_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    content, read = WRITTEN[kind]
    bad, says = BAD_LINES[name]
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(content).encode() + b"\n" + bad + b"\n" + json.dumps(content).encode())
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 2: ") + ".*" + re.escape(says)):
        read(file)


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_file_that_is_not_there_is_refused(tmp_path: Path, kind: str) -> None:
    for file in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"{file}: no such file")):
            WRITTEN[kind][1](file)


@pytest.mark.parametrize(
    ("kind", "command"),
    [("evidence", ["fit", "--data.evidence=a.jsonl"]), ("traces", ["fit", "--bridge.traces=a.jsonl"]),
     ("critiques", ["fit", "--critique.records=a.jsonl"]), ("harvest", ["critique", "--harvest=a.jsonl"])],
)  # fmt: skip
def test_the_command_refuses_a_wrong_edit_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = WRITTEN[kind][0]
    field, value, says = next(edit[1:] for edit in EDITS if edit[0] == kind and edit[2] is not ...)
    Path("a.jsonl").write_bytes(json.dumps(content).encode() + b"\n" + edited(content, field, value) + b"\n")
    assert main([command[0], *FIT[1:], *command[1:]]) == 2
    error = capsys.readouterr().err
    assert "a.jsonl, line 2: " in error
    assert says in error
    assert "Traceback" not in error
    assert not Path("runs").exists()


def test_a_step_does_not_go_on_with_a_file_that_was_wrongly_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    step = ["stratify", *FIT[1:], "--data.train=embedded:chain/train?count=2", "--out=bands.jsonl"]
    assert main(step) == 0
    first, second = Path("bands.jsonl").read_text().splitlines()
    for bad, says in [
        (second.replace('"problem_id"', '"problem"'), "missing fields ['problem_id']"),
        (second.replace('"attempts":1', '"attempts":"one"'), "attempts must be a whole number, not 'one'"),
        ("[]", "must be an object, not []"),
        ("{", "not JSON"),
    ]:
        Path("bands.jsonl").write_text(f"{first}\n{bad}\n")
        capsys.readouterr()
        assert main(step) == 2
        error = capsys.readouterr().err
        assert "bands.jsonl, line 2: " in error
        assert says in error


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("ledger.jsonl", '{"problem_id": "p"}', "Place: unknown fields [], missing fields ['round', "),
        ("ledger.jsonl", "[]", "must be an object, not []"),
        ("harvest.jsonl", '{"place": 1}', "HarvestRow: unknown fields [], missing fields ['group']"),
    ],
)
def test_a_ledger_that_was_wrongly_edited_is_refused(tmp_path: Path, name: str, line: str, says: str) -> None:
    Ledger(tmp_path).harvest([RolloutGroup(PROBLEM, (FAILED,))], Place(1, "grpo"))
    Ledger(tmp_path).record([RolloutGroup(PROBLEM, (FAILED,))], Place(1, "grpo"))
    with open(tmp_path / name, "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}, line 2: {says}")):
        Ledger(tmp_path)


# -- recorded rollouts ------------------------------------------------------------------------------------------------

RECORDED = {"problem": "1 + 1 = ?", "gold": "2", "response": "The answer is \\boxed{2}.", "correct": True}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"problem": ...}, "no column 'problem|question|prompt': there are ['correct', 'gold', 'response']"),
        ({"gold": ...}, "no column 'gold|answer|target'"),
        ({"response": ...}, "no column 'response|completion|text'"),
        ({"problem": ""}, "the question or the gold answer is empty"),
        ({"gold": " "}, "the question or the gold answer is empty"),
        ({"gold": None}, "must be a text or a number: it is null"),
        ({"gold": float("nan")}, "must be finite: it is nan"),
        ({"response": ["a"]}, "must be a text or a number: it is a list"),
        ({"response": "\ud800"}, "holds half a character"),
        ({"correct": "yes"}, "column 'correct' must be true, false or null: it is 'yes'"),
        ({"problem": "2 + 2 = ?", "id": {}}, "the id must be a text or a number: it is an object"),
        ({"problem": "2 + 2 = ?", "id": 0}, "another question has the id '0' already"),
    ],
)
def test_recorded_rollouts_are_refused_at_the_first_bad_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], says: str
) -> None:
    file = tmp_path / "rollouts.jsonl"
    bad = {name: value for name, value in (RECORDED | change).items() if value is not ...}
    file.write_text("\n".join(map(json.dumps, [RECORDED, bad, RECORDED])))
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 2: ") + ".*" + re.escape(says)):
        read_recorded(file)
    assert main(["stratify", *FIT[1:], f"--recorded={file}", f"--out={tmp_path / 'out.jsonl'}"]) == 2
    assert f"{file}, line 2: " in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", BAD_LINES)
def test_recorded_rollouts_are_refused_at_a_line_that_is_no_row(tmp_path: Path, name: str) -> None:
    file = tmp_path / "rollouts.jsonl"
    file.write_bytes(json.dumps(RECORDED).encode() + b"\n" + BAD_LINES[name][0])
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 2: ")):
        read_recorded(file)


def test_recorded_rollouts_in_a_file_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for name in ("a missing file", "an empty file", "text named .gz", "a folder", "JSON broken at line 3"):
        (tmp_path / name).mkdir()
        file, says = refused_file(tmp_path / name, name)
        with pytest.raises(ValueError, match=re.escape(says)):
            read_recorded(file)
