"""Rows of local files, each with where it stands: JSONL, JSON, Parquet, CSV, TSV, and LogiQA's own text form.

A row that cannot be read comes as the error itself, in its place among the others. A file that cannot be read to its
end, or has no row, is refused: an error that names it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from slmreason.data.rows import narrow_float, readable
from slmreason.run.files import parse_line

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt")
"""Of files that are read here, in small letters or large ones, and with `.gz` behind them."""
MAX_CELL_CHARS = 1 << 26
UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file raises that cannot be opened, or whose compression is broken or cut off."""


def is_file_name(path: str) -> bool:
    """Whether a source is a local file: by its suffix, whether it is there or not, or because it is there."""
    return path.lower().removesuffix(".gz").endswith(SUFFIXES) or os.path.isfile(path)


def local_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a local file, in the format that its suffix names; a row that cannot be read is its ValueError.

    Raises:
        ValueError: the file is not there, is empty or cannot be read to its end; the message names it, and the line.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: " + ("a folder, not a file" if os.path.isdir(path) else "no such file"))
    kinds = {".parquet": _parquet_rows, ".json": _json_rows, ".txt": _logiqa_rows, ".csv": _table_rows,
             ".tsv": _table_rows}  # fmt: skip
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    number = 0
    for number, (location, row) in enumerate(kinds.get(suffix, _jsonl_rows)(path), start=1):  # noqa: B007 - counted
        yield readable(location), row
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
        if _is_jsonl(text):
            yield from _lines_of(path, text)
            return
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg.removesuffix(' at')})") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, nested too deeply
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must hold a list of objects, not one {type(rows).__name__}; JSONL is named .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _is_jsonl(text: str) -> bool:
    """Whether the first line of a text is an object by itself, as in files of JSON lines that are named `.json`."""
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _lines_of(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _or_error(line.encode())


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error
    narrow = [field.name for field in table.schema if str(field.type) in ("float", "halffloat")]
    for number in range(table.num_rows):
        try:
            [row] = table.slice(number, 1).to_pylist()
            row |= {name: narrow_float(row[name]) for name in narrow if row[name] is not None}
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time that is no date
            row = ValueError(f"not readable: {error}")
        yield f"{path}, row {number + 1}", row


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a CSV or TSV file whose first line names the columns; a cell may hold line ends in quotes."""
    csv.field_size_limit(MAX_CELL_CHARS)
    line = 1
    try:
        # What is not UTF-8 is kept as half characters, which are then refused row by row.
        with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header_line = file.readline()
            while header_line and not header_line.strip():
                line, header_line = line + 1, file.readline()
            if not header_line:
                return
            delimiter = _delimiter(path, header_line)
            header = _header(path, next(csv.reader([header_line], delimiter=delimiter, strict=True)))
            yield from _cells(path, csv.reader(file, delimiter=delimiter, strict=True), header, line)
    except UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read to its end ({error})") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: the names of the columns cannot be read ({error})") from error


def _cells(path: Path, reader: Any, header: list[str], before: int) -> Iterator[tuple[str, Any]]:
    """The rows behind the header, which ends in line `before`."""
    while True:
        location = f"{path}, line {before + reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise ValueError(
                    f"{location}: a quote is opened and never closed, so the rest cannot be read"
                ) from error
            yield location, ValueError(f"not a row of a table: {error}")
            continue
        if not cells or not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            yield (
                location,
                ValueError(f"not a row of this table: {len(cells)} cells, the first line names {len(header)}"),
            )
        elif any("\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell):
            yield location, ValueError("not UTF-8")
        else:
            yield location, dict(zip(header, cells, strict=True))


def _delimiter(path: Path, header: str) -> str:
    """The tabulator of a TSV file; in a CSV file the comma, or what stands in its place where there is none."""
    if path.name.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    return next((sign for sign in ",;\t" if sign in header), ",")


def _header(path: Path, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}, line 1: two columns have the name {twice[0]!r}")
    return names


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else open(path, "rb")


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
