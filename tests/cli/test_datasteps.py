"""stratify, bridge and critique alone: files a person can edit, cut off and gone on with, and read by fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmreason.cli import main
from slmreason.curriculum import Curriculum
from slmreason.rollout.transformers import HFEngine
from slmreason.teacher.procedural import ProceduralTeacher

CONFIG = ["--config=quickstart", "--data.train=embedded:chain/train?count=24", "--curriculum.probe.attempts=4",
          "--curriculum.rounds=1", "--trainer.accelerator=cpu"]  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of all three steps: bands.jsonl, bridge.jsonl, run/harvest.jsonl, critique.jsonl."""
    folder = tmp_path_factory.mktemp("steps")
    assert main(["stratify", *CONFIG, f"--out={folder / 'bands.jsonl'}"]) == 0
    evidence = f"--data.evidence={folder / 'bands.jsonl'}"
    assert main(["bridge", *CONFIG, evidence, f"--out={folder / 'bridge.jsonl'}"]) == 0
    quiet = ["--benchmarks=[embedded:chain/test?count=4]", "--trainer.enable_progress_bar=false",
             "--grpo.prompts_per_step=8", "--grpo.group_size=3", "--grpo.temperature=1.2"]  # fmt: skip
    assert main(["fit", *CONFIG, *quiet, evidence, "--curriculum.stages=[grpo]", f"--run_dir={folder / 'run'}"]) == 0
    harvest = f"--harvest={folder / 'run' / 'harvest.jsonl'}"
    assert main(["critique", *CONFIG, harvest, f"--out={folder / 'critique.jsonl'}"]) == 0
    return folder


def test_each_step_writes_what_a_person_can_read(files: Path) -> None:
    bands = rows(files / "bands.jsonl")
    assert len(bands) == 24
    assert {row["band"] for row in bands} == {"simple", "medium", "hard"}
    for row in bands:
        assert (row["solution"] is None) == (row["successes"] == 0)
        assert row["solution"] is None or f"boxed{{{row['answer']}}}" in row["solution"]
    wanted = {row["problem_id"] for row in bands if row["band"] != "simple"}
    bridged = rows(files / "bridge.jsonl")
    assert {row["problem"]["id"] for row in bridged} == wanted
    kinds = {c["trace"]["provenance"] for row in bridged for c in row["candidates"]}
    assert kinds >= {"teacher", "bridged"}  # a right solution of the student is often the bridged one to the letter
    harvested = {row["group"]["problem"]["id"] for row in rows(files / "run" / "harvest.jsonl")}
    assert {row["problem"]["id"] for row in rows(files / "critique.jsonl")} == harvested
    assert harvested


def test_fit_starts_from_the_evidence_and_measures_nothing_twice(files: Path) -> None:
    ledger = rows(files / "run" / "ledger.jsonl")
    assert [row["stage"] for row in ledger[:24]] == ["stratify"] * 24
    assert {row["stage"] for row in ledger[24:]} == {"grpo"}


@pytest.mark.parametrize("cut_at", [0, 1, 5])
def test_a_step_that_was_cut_off_goes_on_and_asks_nothing_twice(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int
) -> None:
    out = tmp_path / "bridge.jsonl"
    whole = (files / "bridge.jsonl").read_text()
    asked: list[str] = []
    solve = ProceduralTeacher.solve

    def dies(self: ProceduralTeacher, problems: Any) -> Any:
        asked.extend(problem.id for problem in problems)
        if len(asked) > cut_at and not out.with_suffix(".died").exists():
            out.with_suffix(".died").touch()
            asked[:] = asked[: -len(problems)]
            raise KeyboardInterrupt
        return solve(self, problems)

    monkeypatch.setattr(ProceduralTeacher, "solve", dies)
    monkeypatch.setattr(HFEngine, "batch_size", lambda self, student: 1)
    command = ["bridge", *CONFIG, f"--data.evidence={files / 'bands.jsonl'}", f"--out={out}"]
    assert main(command) == 130
    assert len(out.read_text().splitlines()) == cut_at
    with open(out, "a") as file:
        file.write('{"problem": {"id": "torn')
    assert main(command) == 0
    assert sorted(asked) == sorted(set(asked))
    assert [row["problem"]["id"] for row in rows(out)] == [
        json.loads(line)["problem"]["id"] for line in whole.splitlines()
    ]
    assert [row["chosen"]["text"] for row in rows(out)] == [
        json.loads(line)["chosen"]["text"] for line in whole.splitlines()
    ]


def test_a_file_of_another_configuration_is_not_gone_on_with(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest = f"--harvest={files / 'run' / 'harvest.jsonl'}"
    out = f"--out={files / 'critique.jsonl'}"
    assert main(["critique", *CONFIG, harvest, out, "--critique.attempts_per_problem=1"]) == 2
    assert "critique.attempts_per_problem (2 then, 1 now)" in capsys.readouterr().err
    (tmp_path / "mine.jsonl").write_text("{}\n")
    assert main(["stratify", *CONFIG, f"--out={tmp_path / 'mine.jsonl'}"]) == 2
    assert "not known to be of this step" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["stratify", "bridge", "critique"])
def test_dry_run_counts_and_does_nothing(
    files: Path, tmp_path: Path, step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"--harvest={files / 'run' / 'harvest.jsonl'}"] if step == "critique" else []
    out = tmp_path / "out.jsonl"
    assert main([step, *CONFIG, *more, f"--out={out}", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"{step}: what would be" in shown
    assert "nothing" in shown  # nothing is paid for
    assert list(tmp_path.iterdir()) == []


def edit(source: Path, target: Path, change: Any) -> Path:
    target.write_text("".join(json.dumps(change(row)) + "\n" for row in rows(source)))
    return target


def test_edited_traces_are_what_sft_trains_on_and_wrong_ones_are_refused(files: Path, tmp_path: Path) -> None:
    first, second = (row["problem"]["id"] for row in rows(files / "bridge.jsonl")[:2])

    def change(row: dict[str, Any]) -> dict[str, Any]:
        if row["problem"]["id"] == first:
            row["chosen"]["text"] = "A person wrote this.\n" + row["chosen"]["text"]
        if row["problem"]["id"] == second:
            row["chosen"]["text"] = "1+1=2\nThe answer is \\boxed{-1}."
        return row

    edited = edit(files / "bridge.jsonl", tmp_path / "edited.jsonl", change)
    run = tmp_path / "run"
    assert main(["fit", *CONFIG, f"--data.evidence={files / 'bands.jsonl'}", f"--bridge.traces={edited}",
                 "--curriculum.stages=[sft]", "--sft.epochs=1", "--curriculum.evaluate=ends", f"--run_dir={run}",
                 "--benchmarks=[embedded:chain/test?count=4]", "--trainer.enable_progress_bar=false"]) == 0  # fmt: skip
    targets = {row["problem_id"]: row["target"] for row in rows(run / "round-01" / "sft" / "set-epoch-1.jsonl")}
    assert targets[first].startswith("A person wrote this.")
    assert second not in targets
    rejects = {row["id"]: row["reason"] for row in rows(run / "round-01" / "sft" / "rejects.jsonl")}
    assert rejects[second] == "final answer does not verify"


def test_edited_critiques_are_what_cft_trains_on_and_wrong_ones_are_refused(files: Path, tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        row["new_trace"] = "The answer is \\boxed{-1}."
        if row["diagnosis"]:
            row["diagnosis"]["explanation"] = "A person saw why."
        return row

    edited = edit(files / "critique.jsonl", tmp_path / "edited.jsonl", change)
    run = tmp_path / "run"
    assert main(["fit", *CONFIG, f"--critique.records={edited}", "--curriculum.stages=[cft]",
                 "--curriculum.evaluate=ends", f"--run_dir={run}", "--benchmarks=[embedded:chain/test?count=4]",
                 "--trainer.enable_progress_bar=false"]) == 0  # fmt: skip
    trained = rows(run / "round-01" / "cft" / "set-epoch-1.jsonl")
    assert {row["origin"] for row in trained} == {"diagnosis", "repair"}
    assert all("A person saw why." in row["target"] for row in trained if row["origin"] == "diagnosis")
    reasons = [row["reason"] for row in rows(run / "round-01" / "cft" / "rejects.jsonl")]
    assert reasons.count("new_trace: final answer does not verify") == len(rows(edited))


def test_given_critiques_are_for_one_cft_also_when_the_run_is_resumed(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    restore = Curriculum._restore

    def spy(self: Curriculum, *found: Any) -> None:
        restore(self, *found)
        left.append(len(self.stages["cft"].given))  # type: ignore[attr-defined]

    monkeypatch.setattr(Curriculum, "_restore", spy)
    fit = ["fit", *CONFIG, f"--critique.records={files / 'critique.jsonl'}", "--curriculum.stages=[cft]",
           "--curriculum.evaluate=ends", f"--run_dir={tmp_path / 'run'}", "--resume=auto",
           "--benchmarks=[embedded:chain/test?count=4]", "--trainer.enable_progress_bar=false"]  # fmt: skip
    assert main(fit) == main(fit) == 0
    assert left == [len(rows(files / "critique.jsonl")), 0]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--data.evidence=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--bridge.traces=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--critique.records=broken.jsonl"], "broken.jsonl, line 1"),
        (["--data.evidence=impossible.jsonl"], "impossible.jsonl, line 1: 9 successes of 4 attempts cannot be"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"problem": 1}\n')
    Path("impossible.jsonl").write_text('{"problem_id": "p", "attempts": 4, "successes": 9}\n')
    assert main(["fit", *CONFIG, *args]) == 2
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()
