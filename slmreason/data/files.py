"""Rows of local files, each with where it stands: JSONL, JSON, Parquet, and LogiQA's own text form.

A row that cannot be read comes as the error itself, in its place among the others. A file that cannot be read to its
end, or has no row, is refused: an error that names it.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from slmreason.runfolder import parse_line

LOCAL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt", ".txt.gz")
UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file raises that cannot be opened, or whose compression is broken or cut off."""


def local_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a local JSONL, JSON, Parquet or LogiQA text file; a row that cannot be read is its ValueError.

    Raises:
        ValueError: the file is not there, is empty or cannot be read to its end; the message names it, and the line.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: " + ("a folder, not a file" if os.path.isdir(path) else "no such file"))
    kinds = {".parquet": _parquet_rows, ".json": _json_rows, ".txt": _logiqa_rows}
    suffix = Path(path.name.removesuffix(".gz")).suffix
    number = 0
    for number, row in enumerate(kinds.get(suffix, _jsonl_rows)(path), start=1):  # noqa: B007 - counted
        yield row
    if not number:
        raise ValueError(f"{path}: empty, there is no row in it")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _or_error(line)
    except UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read past line {number} ({error})") from error


def _or_error(line: bytes) -> Any:
    try:
        return parse_line(line)
    except ValueError as error:
        return error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = _whole_text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg.removesuffix(' at')})") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, nested too deeply
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must hold a list of objects, not one {type(rows).__name__}; JSONL is named .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error
    for number in range(table.num_rows):
        try:
            [row] = table.slice(number, 1).to_pylist()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time that is no date
            row = ValueError(f"not readable: {error}")
        yield f"{path}, row {number + 1}", row


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def _whole_text(path: Path) -> str:
    try:
        with _opened(path) as file:
            data = file.read()
    except UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read to its end ({error})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error


def _logiqa_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of LogiQA's own text files, with the columns that it has on the hub.

    Blank lines part the blocks; each is the letter of the right option, the context, the question and the options.
    """
    block: list[str] = []
    for number, line in enumerate([*_whole_text(path).split("\n"), ""], start=1):
        if line.strip():
            block.append(line.strip())
        elif block:
            yield f"{path}, line {number - len(block)}", _logiqa_row(block)
            block = []


def _logiqa_row(block: list[str]) -> dict[str, Any] | ValueError:
    if len(block) != 7 or block[0].lower() not in ("a", "b", "c", "d"):
        return ValueError(
            "a LogiQA block is seven lines after a blank one (letter a to d, context, question, four options); "
            f"this has {len(block)} and starts with {block[0][:20]!r}"
        )
    labelled = [re.fullmatch(r"([A-Da-d])(?:[.?:]|(?=\s))\s*(.+)", line) for line in block[3:]]
    options = [match.group(2) if match else line for match, line in zip(labelled, block[3:], strict=True)]
    labels = [match.group(1).upper() if match else "" for match in labelled]
    # Some blocks list A, C, B, D, and the right letter means the label; in others translation garbled the labels.
    if sorted(labels) == ["A", "B", "C", "D"]:
        options = [options[labels.index(label)] for label in "ABCD"]
    return {
        "context": block[1],
        "query": block[2],
        "options": options,
        "correct_option": "abcd".index(block[0].lower()),
    }
