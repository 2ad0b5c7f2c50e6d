"""One file for tensors and plain values, without pickle, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict, deque
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loops.progress import _Progress
from safetensors import safe_open

from slmreason.curriculum.resume import checkpoints, next_checkpoint, prune
from slmreason.curriculum.state import RunState
from slmreason.records import Critique, Reject, Tokens
from slmreason.run.files import append_records, write_folder, write_text
from slmreason.run.journal import Journal
from slmreason.run.tree import SafetensorsIO, load_tree, save_tree


class Kind(StrEnum):
    ONE = "one"


TREE: dict[str, Any] = {
    "a": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    "b": {"c": [1, 2.5, None, True, "text \u2713", float("inf")], 3: ("x", (torch.tensor(0.1),))},
    "empty": [{}, [], (), torch.zeros(0, 4)],
    "$tensor": "a key like a mark",
    "half": torch.randn(5).bfloat16(),
    "ordered": OrderedDict(z=1, a=2),
    "enum": Kind.ONE,
    "path": Path("x/y"),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("through", ["functions", "Lightning"])
def test_a_tree_comes_back_as_it_was(tmp_path: Path, through: str) -> None:
    path = tmp_path / "folder" / "x.ckpt"
    if through == "functions":
        save_tree(path, TREE)
    else:
        SafetensorsIO().save_checkpoint(TREE, path)
    found = load_tree(path) if through == "functions" else SafetensorsIO().load_checkpoint(path)
    expected = {**TREE, "enum": "one", "path": "x/y", "ordered": {"z": 1, "a": 2}}
    assert same(found, expected)
    assert [p.name for p in path.parent.iterdir()] == ["x.ckpt"]
    assert load_tree(path, with_tensors=False)["a"] is None
    SafetensorsIO().remove_checkpoint(path)
    assert not path.exists()


def test_one_tensor_is_written_once_and_a_view_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    weight = torch.randn(1000, 10)
    save_tree(tmp_path / "x", {"embed": weight, "head": weight, "transposed": weight.t(), "row": weight[3]})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert len(list(file.keys())) == 4  # embed, transposed, row, and the tree
    found = load_tree(tmp_path / "x")
    assert torch.equal(found["head"], weight)
    assert torch.equal(found["transposed"], weight.t())
    assert torch.equal(found["row"], weight[3])
    assert (tmp_path / "x").stat().st_size < 2 * weight.numel() * 4 + 2000


def test_what_only_pickle_could_keep_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="checkpoint/callbacks/mine/1: a _Progress cannot be kept without pickle"):
        save_tree(tmp_path / "x", {"callbacks": {"mine": [1, _Progress()]}})
    assert not list(tmp_path.iterdir())


KEPT: dict[str, Any] = {
    "array": np.arange(6, dtype=np.float32).reshape(2, 3), "no dimension": np.array(1.5), "empty": np.zeros((0, 3)),
    "transposed": np.arange(6).reshape(2, 3).T, "texts": np.array(["a", "bcd"]),
    "dates": np.array(["2026-01-02"], "M8[D]"),
    "unsigned": np.arange(3, dtype=np.uint16), "half": np.ones(2, np.float16), "number": np.float32(0.1),
    "int64": np.int64(7), "true": np.bool_(True), "set": {1, "a", (2, 3)}, "frozenset": frozenset({1}), "no set": set(),
    "bytes": b"\x00\xff", "date": date(2026, 1, 2), "time": datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    "duration": timedelta(days=-1, microseconds=5), "deque": deque([1, 2], maxlen=2), "complex": 1 - 2j,
    "in a dict of numbers": {1: np.arange(2)}, "in a tuple": ({1}, np.arange(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_callbacks_commonly_keep_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    save_tree(tmp_path / "x", {"state": KEPT[name], "beside": [1, {"a": None}]})
    found = load_tree(tmp_path / "x")
    assert found["beside"] == [1, {"a": None}]
    assert repr(found["state"]) == repr(KEPT[name]) or found["state"] == KEPT[name]
    assert type(found["state"]) is type(KEPT[name])
    if isinstance(KEPT[name], np.ndarray):
        assert found["state"].dtype == KEPT[name].dtype
        assert found["state"].flags.writeable
    load_tree(tmp_path / "x", with_tensors=False)


def test_a_callbacks_state_that_cannot_be_kept_is_left_out_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = {"state_dict": {"w": torch.ones(1)}, "callbacks": {"good": {"n": 1}, "bad one": {"x": [_Progress()]}},
            "of a hook": _Progress(), "epoch": 3}  # fmt: skip
    for _ in range(2):
        SafetensorsIO().save_checkpoint(tree, tmp_path / "x")
    found = load_tree(tmp_path / "x")
    assert list(found) == ["state_dict", "callbacks", "epoch"]
    assert found["callbacks"] == {"good": {"n": 1}}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "of a hook is left out" in told[0]
    assert "callbacks/bad one is left out, so a run that goes on begins it anew: checkpoint/x/0: a _Progress" in told[1]
    with pytest.raises(TypeError):
        SafetensorsIO().save_checkpoint({"loops": _Progress()}, tmp_path / "y")


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_torn_file_is_no_checkpoint(tmp_path: Path, cut: int) -> None:
    save_tree(tmp_path / "x", TREE)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:cut])
    with pytest.raises(ValueError, match="not a checkpoint, or a torn one"):
        load_tree(tmp_path / "x")
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_tree(tmp_path / "nothing")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    """With a limit on the size of files; a limit cannot be lifted again, so in a process of its own."""
    code = """
import resource, sys
from pathlib import Path
import torch
from slmreason.run.tree import load_tree, save_tree
from slmreason.run.files import append_records, write_folder, write_text
folder = Path(sys.argv[1])
save_tree(folder / "x", {"w": torch.ones(10)})
write_text(folder / "t", "small")
append_records(folder / "l.jsonl", [{"row": 1}])
write_folder(folder / "f", lambda p: (p / "a").write_text("a"))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for write in (
    lambda: save_tree(folder / "x", {"w": torch.ones(100_000)}),
    lambda: write_text(folder / "t", "x" * 100_000),
    lambda: append_records(folder / "l.jsonl", [{"row": "x" * 100_000}]),
    lambda: write_folder(folder / "f", lambda p: (p / "a").write_text("b" * 100_000)),
):
    try:
        write()
    except OSError as error:
        print(error.errno, error.filename)
assert load_tree(folder / "x")["w"].shape == (10,)
assert (folder / "t").read_text() == "small"
assert (folder / "l.jsonl").read_text() == '{"row":1}\\n'
assert (folder / "f" / "a").read_text() == "a"
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], text=True, capture_output=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["27"] * 4  # EFBIG
    assert all(str(tmp_path) in line for line in lines[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "l.jsonl", "t", "x"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", lambda folder: (folder / "old").write_text("old"))
    write_folder(tmp_path / "f", lambda folder: (folder / "new").write_text("new"))
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["new"]

    def fails(folder: Path) -> None:
        (folder / "newer").write_text("")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_folder(tmp_path / "f", fails)
    assert [path.name for path in tmp_path.rglob("*")] == ["f", "new"]


def test_the_newest_and_the_newest_after_a_stage_are_kept(tmp_path: Path) -> None:
    for name in ("after-base", "in-1", "after-round-1-sft", "in-2", "in-3", "in-4"):
        save_tree(next_checkpoint(tmp_path, name), {})
        prune(tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "000003-after-round-1-sft.ckpt", "000005-in-3.ckpt", "000006-in-4.ckpt"
    ]  # fmt: skip


def test_the_state_of_a_run_survives_its_file(tmp_path: Path) -> None:
    state = RunState(policy_version=7, elapsed=1.5, bands={"a": "hard"}, sizes={"x.jsonl": 3})
    save_tree(tmp_path / "x", state.as_tree())
    assert RunState.from_tree(load_tree(tmp_path / "x")) == state


def test_the_journal_gives_what_was_noted_and_makes_the_rest(tmp_path: Path) -> None:
    """A torn last note is as if it were not there; what was rejected, and the cost, come with the chunk of theirs."""
    asked: list[list[int]] = []
    aside: list[Reject] = []

    tokens = Tokens()

    def make(chunk: list[int]) -> list[dict[str, int]]:
        asked.append(chunk)
        tokens.sampled += len(chunk)
        aside.append(Reject(str(chunk[0]), "teacher", "no answer"))
        return [{"square": number**2} for number in chunk if number != 3]

    def drain() -> list[Reject]:
        taken = aside.copy()
        aside.clear()
        return taken

    def journal() -> Journal:
        tokens.sampled = 100
        opened = Journal(tmp_path, drain, lambda: tokens)
        opened.open()
        return opened

    first = journal()
    results = first.chunks("key", range(5), make, dict, 2)
    assert [row["square"] for row in results] == [0, 1, 4, 16]
    path = tmp_path / "resume" / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-10])  # of the third chunk
    asked.clear()
    second = journal()
    assert second.chunks("key", range(5), make, dict, 2) == results
    assert asked == [[4]]
    assert tokens == Tokens(sampled=105)
    assert [reject.id for reject in second.take_rejects()] == ["0", "2", "4"]
    assert second.chunks("other", range(1), make, dict, 2) == [{"square": 0}]
    assert journal().chunks("key", range(5), make, dict, 2) == results
    second.clear()
    assert not path.exists()
    assert journal().chunks("none", [], make, Critique, 2) == []


def test_text_is_synced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, plain=plain: (seen.append(n), plain(*args))[1])
    write_text(tmp_path / "x", "text")
    save_tree(tmp_path / "y", {"w": torch.ones(3)})
    assert seen == ["fsync", "replace", "fsync"] * 2  # the file, its name, and the folder that holds the name
    seen.clear()
    append_records(tmp_path / "z", [{}])
    assert seen == ["fsync"]
