"""The files of a run. Whole files are written to a temporary name, synced, then renamed; nothing is half there.

Of several processes, which all hold the same records, the first one writes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import shutil
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from slmreason.records import from_json, to_json
from slmreason.runtime.distributed import is_first

T = TypeVar("T")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of writing say which file it was, and are the operating system's: safetensors hides them in its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        hidden = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(hidden.group(1)) if hidden else None
        raise OSError(number, os.strerror(number) if number else str(error), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
        OSError: it cannot be written, e.g. since the disk is full.
    """
    if is_first():
        write_file(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Writes a file so that it is there whole or not at all.

    Args:
        fill: called with the path to write to, which is another.

    Raises:
        OSError: it cannot be written, e.g. since the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with _naming(path):
        try:
            mode = _mode_of_new(temporary)
            fill(temporary)
            temporary.chmod(mode)
            replace_synced(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def replace_synced(temporary: Path, path: Path) -> None:
    """Gives a finished file its name once it is on the disk, and makes sure that the name is there too."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Writes a folder so that it is there whole or not at all; one that is there already is replaced.

    Args:
        fill: called with an empty folder to write into.

    Raises:
        OSError: it cannot be written, e.g. since the disk is full.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with _naming(folder):
        try:
            temporary.mkdir(parents=True)
            mode = _mode_of_new(temporary / "file")
            (temporary / "file").unlink()
            fill(temporary)
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(mode)
                _sync(path)
            _sync(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    if folder.exists():
        os.replace(folder, old)  # a folder cannot take the place of one that is not empty
    os.replace(temporary, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _mode_of_new(path: Path) -> int:
    """Makes an empty file, and gives the mode that the umask lets it have: safetensors makes files of its own mode."""
    path.unlink(missing_ok=True)
    path.touch()
    return path.stat().st_mode


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def is_no_room(error: Exception) -> bool:
    """Whether an error says that a disk is full; libraries in Rust say so in the text of a bare exception."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    return number in NO_ROOM


"""What the operating system says when a file cannot grow: disk, file size limit, quota."""


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Writes records (dataclasses or plain dicts) as JSONL."""
    rows = (record if isinstance(record, dict) else to_json(record) for record in records)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_records(path: Path, cls: type[T]) -> list[T]:
    """The records of a JSONL file.

    Raises:
        ValueError: the file is not there, or a line is not such a record; the message names file and line.
    """
    return [record_of(cls, row, location) for location, row in written_rows(path)]


def record_of(cls: type[T], row: Any, location: str) -> T:
    """The record in a row of a file.

    Raises:
        ValueError: the row is no such record; the message says where it stands and why.
    """
    try:
        return from_json(cls, row)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error


def written_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a JSONL file that slmreason wrote and a person may have edited. It is read as a whole or refused.

    Raises:
        ValueError: the file cannot be read, or a line of it is not JSON; the message names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", parse_line(line)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}; mend the line or remove it") from error


def parse_line(line: bytes) -> Any:
    """The JSON of one line.

    Raises:
        ValueError: the line is not UTF-8 or not JSON.
    """
    try:
        # Without the line's end, which a text that is cut off would seem to hold.
        return json.loads(line.removeprefix(BOM_UTF8).rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, nested too deeply
        raise ValueError(f"cannot be read as JSON: {error}") from error


AT_ONCE = 8192
"""Records that are held as text at a time: a million of them would be most of what a pool of that size takes."""


def append_records(path: Path, records: Iterable[Any]) -> None:
    """Adds records to the end of a JSONL file, synced; a crash leaves the first of them, at worst a torn last line.

    Raises:
        OSError: they cannot be written, e.g. since the disk is full; the file is as it was.
    """
    if not is_first():
        return
    rows = (record if isinstance(record, dict) else to_json(record) for record in records)
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path), open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while data := "".join(islice(lines, AT_ONCE)).encode():
                while data:
                    data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an append-only JSONL file; a torn last line is cut off, a broken line before it is an error.

    Raises:
        ValueError: a complete line is not JSON or not an object; the message names file and line.
    """
    return (row for _, row in placed_lines(path))


def placed_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read_lines`, with where each row stands."""
    if not path.exists():
        return
    end = _end_of_lines(path)
    if end < path.stat().st_size and is_first():
        os.truncate(path, end)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn, and another process cuts it off
            location = f"{path}, line {number}"
            try:
                row = parse_line(line)
            except ValueError as error:
                raise ValueError(f"{location}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{location}: must be an object, not {reprlib.repr(row)}")
            yield location, row


def _end_of_lines(path: Path, block: int = 1 << 16) -> int:
    """Bytes of a file up to the end of its last whole line."""
    with open(path, "rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position:
            start = max(0, position - block)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            position = start
    return 0
