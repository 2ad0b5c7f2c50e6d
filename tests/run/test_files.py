"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slmreason.run import files
from slmreason.run.files import append_records, read_lines, write_file, write_folder, write_text


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_files_have_the_mode_that_the_umask_lets_them_have(tmp_path: Path, umask: int) -> None:
    def fill(path: Path) -> None:
        save_file({"a": torch.zeros(1)}, path)  # which by itself lets the owner alone read

    write_text(tmp_path / "text", "x")
    write_file(tmp_path / "tensors", fill)
    write_folder(tmp_path / "folder", lambda folder: fill(folder / "tensors"))
    for name in ("text", "tensors", "folder/tensors"):
        assert mode(tmp_path / name) == 0o666 & ~umask
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["tensors"]


def rows(count: int, broken: int | None = None) -> Iterator[dict[str, Any]]:
    for number in range(count):
        if number == broken:
            raise RuntimeError("no such row")
        yield {"row": number}


def test_records_of_several_pieces_stand_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "AT_ONCE", 2)
    path = tmp_path / "rows.jsonl"
    append_records(path, rows(3))
    append_records(path, rows(4))
    assert [row["row"] for row in read_lines(path)] == [0, 1, 2, 0, 1, 2, 3]


def test_no_more_than_a_piece_is_held_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    dumps = json.dumps

    def noting(*args: Any, **options: Any) -> str:
        held.append(path.stat().st_size)
        return dumps(*args, **options)

    monkeypatch.setattr(files, "AT_ONCE", 2)
    monkeypatch.setattr(files.json, "dumps", noting)
    path = tmp_path / "rows.jsonl"
    append_records(path, rows(5))
    assert held == [0, 0, 20, 20, 40]  # on the disk when a row is made into text


@pytest.mark.parametrize("torn", ["", '{"row": 3', "x" * 200_000])
def test_a_torn_last_line_is_cut_off_and_the_others_are_read(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_records(path, rows(3))
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    assert [row["row"] for row in read_lines(path)] == [0, 1, 2]
    assert path.read_bytes() == whole


def test_a_file_of_one_torn_line_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"row"')
    assert list(read_lines(path)) == []
    assert path.read_bytes() == b""


def test_a_row_that_cannot_be_made_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "AT_ONCE", 2)
    path = tmp_path / "rows.jsonl"
    append_records(path, rows(1))
    with pytest.raises(RuntimeError, match="no such row"):
        append_records(path, rows(6, broken=5))
    assert [row["row"] for row in read_lines(path)] == [0]
