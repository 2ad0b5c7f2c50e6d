"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slmreason.run.files import write_file, write_folder, write_text


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
