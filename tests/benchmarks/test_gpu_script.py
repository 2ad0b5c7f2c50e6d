"""`benchmarks.gpu` on a CPU, at toy size: whether the script that is meant for a GPU runs at all, and stands faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import FILE, chosen, run_sections, table, without_paths
from benchmarks.gpu_sections import SECTIONS, Lab, Outcome, Section, Skip
from benchmarks.gpu_sections.decoding import beside_plain
from benchmarks.gpu_sections.lab import worst
from slmreason.rollout.sampling import sample
from slmreason.student.packing import PackedBatch, collate

ABSENT = ("math_verify", "jsonargparse", "openai", "vllm", "trl", "datasets")
"""Packages that a machine with a GPU may be without."""


def run(out: Path, *args: str, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, in which some packages cannot be imported."""
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent!r})); sys.argv[1:] = {list(args)!r}; "
    code += "runpy.run_module('benchmarks.gpu', run_name='__main__', alter_sys=True)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=400, check=False
    )


def found(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / FILE).read_text()))


def assert_no_path(text: str, *more: Path) -> None:
    for path in (*more, Path.cwd(), Path(sys.prefix), Path.home(), Path("/tmp"), Path("/dev/shm")):
        assert f"{path}/" not in text


@pytest.mark.long
@pytest.mark.slow
def test_every_section_runs_and_passes_or_says_why_not(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = found(tmp_path)
    assert [row["name"] for row in result["sections"]] == [section.name for section in SECTIONS]
    for row in result["sections"]:
        if row["verdict"] == "skipped":
            assert row["figure"] == "skipped: steps are recorded on a CUDA device"
        else:
            assert row["verdict"] in ("passed", "measured"), row
            assert row["figures"]
            assert row["seconds"] > 0
    assert sum(row["verdict"] == "skipped" for row in result["sections"]) == 1
    assert {"torch", "transformers", "lightning", "peft"} <= result["versions"].keys()
    assert result["running"] is None
    assert result["device"] == {"name": "cpu"}
    assert_no_path((tmp_path / FILE).read_text(), tmp_path)
    assert done.stdout.count("section ") == 1
    assert all(section.passes_when in done.stdout for section in SECTIONS)


@pytest.mark.slow
def test_it_needs_neither_trl_nor_what_the_command_line_needs(tmp_path: Path) -> None:
    done = run(
        tmp_path, "--device", "cpu", "--out", str(tmp_path), "--sections", "grpo_step", "sft", "fsdp", absent=ABSENT
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = {row["name"]: row for row in found(tmp_path)["sections"]}
    assert rows["fsdp"]["verdict"] == "passed"
    for name in ("grpo_step", "sft"):
        assert rows[name]["figures"]["ours"] > 0
        assert rows[name]["figures"]["trl"] == "not installed: trl, datasets"


def section(name: str, run: Any, seconds: float = 1) -> Section:
    return Section(name, run, seconds, "it is right")


def test_a_section_that_raises_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    def breaks(_: Lab) -> Outcome:
        raise RuntimeError(f"cannot read {tmp_path / 'folder' / 'weights.bin'}")

    def skips(_: Lab) -> Outcome:
        raise Skip("no such kernel here")

    sections = [
        section("breaks", breaks),
        section("skips", skips),
        section("wrong", lambda _: Outcome("2 off", False, {"off": 2.0})),
        section("right", lambda _: Outcome("0 off", True, {"off": float("inf"), "share": 1 / 3})),
        section("figure", lambda _: Outcome("3 ms", None)),
    ]
    rows = run_sections(sections, Lab("cpu", tmp_path), 60, tmp_path)
    assert [row["verdict"] for row in rows] == ["failed", "skipped", "failed", "passed", "measured"]
    written = found(tmp_path)["sections"]
    assert written[0]["figure"] == "RuntimeError: cannot read weights.bin"
    assert written[0]["error"][-1].endswith(" breaks")
    assert written[1]["figure"] == "skipped: no such kernel here"
    assert written[3]["figures"] == {"off": "inf", "share": 0.333333}
    assert_no_path((tmp_path / FILE).read_text(), tmp_path)
    assert table(rows).count("\n") == len(sections)


def test_what_is_known_is_written_after_each_section_and_says_which_one_runs(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def looks(_: Lab) -> Outcome:
        seen.append(found(tmp_path))
        return Outcome("seen", True)

    run_sections([section("first", looks), section("second", looks)], Lab("cpu", tmp_path), 60, tmp_path)
    assert [one["running"] for one in seen] == ["first", "second"]
    assert [[row["name"] for row in one["sections"]] for one in seen] == [[], ["first"]]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_section_that_does_not_fit_the_budget_is_skipped_and_a_later_one_that_does_runs(tmp_path: Path) -> None:
    class Priced(Section):
        def estimate(self, lab: Lab) -> float:
            return self.seconds

    fine = Outcome("done", True)
    sections = [Priced("long", lambda _: fine, 500, ""), Priced("short", lambda _: fine, 1, "")]
    rows = run_sections(sections, Lab("cpu", tmp_path), 60, tmp_path)
    assert [row["verdict"] for row in rows] == ["skipped", "passed"]
    assert rows[0]["figure"].startswith("skipped: needs 500 s, ")


def test_a_section_that_hangs_is_stopped_at_the_end_of_the_budget(tmp_path: Path) -> None:
    def hangs(_: Lab) -> Outcome:
        while True:
            try:
                time.sleep(60)
            except Exception:  # as code does that tries one way after another
                continue

    rows = run_sections([section("hangs", hangs)], Lab("cpu", tmp_path), 6, tmp_path)
    assert rows[0]["verdict"] == "failed"
    assert rows[0]["figure"].startswith("OutOfTime: stopped after")


def test_engine_options_are_put_beside_none(tmp_path: Path) -> None:
    outcome = beside_plain(
        Lab("cpu", tmp_path), "modules", fast_weights=False
    )  # what `graphs` does with another option
    assert outcome.passed
    assert outcome.figures["same"] == 1
    assert outcome.figures["lora, 16 rows"].keys() == {"modules_ms", "plain_ms"}


def continued(*args: Any, **options: Any) -> PackedBatch:
    """A batch whose position ids do not start again with each sequence."""
    batch = collate(*args, **options)
    batch.position_ids = torch.arange(batch.position_ids.shape[1]).repeat(len(batch.position_ids), 1)
    return batch


def off_by_a_hundredth(*args: Any) -> tuple[Tensor, Tensor]:
    token, log_prob = sample(*args)
    return token, log_prob + 0.01


@pytest.mark.parametrize(
    ("name", "target", "broken"),
    [
        ("mask", "benchmarks.gpu_sections.numbers.collate", continued),
        ("decode", "slmreason.rollout.transformers.sample", off_by_a_hundredth),
        ("lora", "slmreason.student.lora.Adapter._apply", torch.nn.Linear._apply),
        ("resume", "slmreason.student.optimizer.MasterAdamW.load_state_dict", torch.optim.AdamW.load_state_dict),
    ],
)
def test_a_section_fails_where_what_it_looks_at_is_broken(
    name: str, target: str, broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, broken)
    (row,) = run_sections(chosen([name], SECTIONS), Lab("cpu", tmp_path), 100, tmp_path)
    assert row["verdict"] == "failed"
    assert "error" not in row


def test_nan_is_no_small_difference() -> None:
    assert worst(torch.tensor([0.0, float("nan")]), torch.zeros(2)) == float("inf")


def test_sections_are_chosen_by_name_in_their_own_order() -> None:
    assert [one.name for one in chosen(["head", "env"], SECTIONS)] == ["env", "head"]
    with pytest.raises(ValueError, match="there is no speed; there are env, cudnn"):
        chosen(["speed"], SECTIONS)


def test_all_sections_fit_the_budget_of_one_run() -> None:
    assert sum(one.seconds for one in SECTIONS) < 330 - 15  # imports and the model take some


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("open /home/me/model/weights.bin failed", "open weights.bin failed"),
        ("see https://pytorch.org/docs/stable", "see https://pytorch.org/docs/stable"),
        ("8 tokens/s and 3/4", "8 tokens/s and 3/4"),
        ("('/dev/shm/x/a', 1)", "('a', 1)"),
    ],
)
def test_paths_of_the_machine_are_left_out(text: str, kept: str) -> None:
    assert without_paths(text) == kept
