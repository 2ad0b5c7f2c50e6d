"""The whole curriculum and its data steps with a teacher behind an API that fails three times in ten."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from slmreason.cli import main
from slmreason.embedded.families import make_problems
from tests.runs import command
from tests.scripted_server import CONTENT, TRANSPORT, ScriptedServer, true_brain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed"),
]

CONFIG = [
    "--config=quickstart", "--data.train=embedded:chain/train?count=32", "--curriculum.rounds=1",
    "--curriculum.evaluate=ends", "--curriculum.probe.attempts=4", "--curriculum.probe.epoch_share=0",
    "--grpo.prompts_per_step=8", "--grpo.group_size=3", "--sft.epochs=1", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--benchmarks=[embedded:chain/test?count=10]",
]  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def teacher(server: ScriptedServer, folder: Path) -> list[str]:
    return ["--teacher=APITeacher", f"--teacher.base_url={server.base_url}", "--teacher.model=m",
            f"--teacher.answers={folder / 'answers.jsonl'}"]  # fmt: skip


def test_every_problem_is_trained_on_or_set_aside_and_a_rerun_asks_nothing(tmp_path: Path) -> None:
    brain = true_brain(make_problems("chain", "train", 32))
    with ScriptedServer(brain, (*TRANSPORT, *CONTENT), rate=0.3, retry_after="0.01") as server:
        for name in ("first", "again"):
            assert main(["fit", *CONFIG, *teacher(server, tmp_path), f"--run_dir={tmp_path / name}"]) == 0
            asked = server.attempts
            server.faults = ()  # what failed for good the first time is answered now; nothing else is asked
    first, again = tmp_path / "first", tmp_path / "again"
    assert asked > 0
    assert max(server.counts.values()) <= 6 + 1  # six tries of a request, and one more in the second run
    for run in (first, again):
        sft = run / "round-01" / "sft"
        strata = rows(sft / "strata.jsonl")[0]["counts"]
        bridged = {row["problem"]["id"] for row in rows(sft / "bridge.jsonl")}
        trained = {row["problem_id"] for row in rows(sft / "set-epoch-1.jsonl")}
        rejected = {row["id"] for row in rows(sft / "rejects.jsonl")}
        assert len(bridged) == strata["medium"] + strata["hard"]
        assert bridged <= trained | rejected  # none is lost
        outcomes = {entry["stage"]: entry["outcome"] for entry in json.loads((run / "summary.json").read_text())}
        assert set(outcomes.values()) == {"done"}
    assert any("teacher" in row["where"] for row in rows(first / "round-01" / "sft" / "rejects.jsonl"))


def test_steps_alone_ask_once_and_say_what_it_would_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    brain = true_brain(make_problems("chain", "train", 32))
    bands = tmp_path / "bands.jsonl"
    assert main(["stratify", *CONFIG, f"--out={bands}"]) == 0
    with ScriptedServer(brain) as server:
        prices = ["--teacher.input_price=1", "--teacher.output_price=2"]
        step = ["bridge", *CONFIG, *teacher(server, tmp_path), *prices, f"--data.evidence={bands}"]
        capsys.readouterr()
        assert main([*step, "--dry_run"]) == 0
        assert server.attempts == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "solve:" in shown
        assert "USD" in shown
        for name in ("one", "two"):
            assert main([*step, f"--out={tmp_path / name}.jsonl"]) == 0
            asked = server.attempts
    assert max(server.counts.values()) == 1
    assert asked == len(rows(tmp_path / "answers.jsonl"))
    assert rows(tmp_path / "one.jsonl") == rows(tmp_path / "two.jsonl")
    # The server is gone: a file that is whole needs it no more; a new one does, but for what is on disk.
    assert main([*step, f"--out={tmp_path / 'one'}.jsonl"]) == 0
    capsys.readouterr()
    assert main([*step, f"--out={tmp_path / 'three'}.jsonl"]) == 1
    assert f"the teacher m at {server.base_url} cannot be asked: Connection error" in capsys.readouterr().err
    assert main([*step, f"--out={tmp_path / 'three'}.jsonl", "--teacher.max_requests=0"]) == 0
    assert rows(tmp_path / "one.jsonl") == rows(tmp_path / "three.jsonl")


@pytest.mark.long
def test_a_run_that_goes_on_looks_for_the_teacher_where_it_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with ScriptedServer(true_brain(make_problems("chain", "train", 32))) as server:
        args = ["fit", *CONFIG, *teacher(server, tmp_path), "--curriculum.checkpoint.every_n_steps=1",
                "--data.batch_size=2", "--trainer.callbacks+=tests.plugins.Dies", f"--run_dir={run}"]  # fmt: skip
        monkeypatch.setenv("DIES_IN", "grpo")
        assert command(*args).returncode == -signal.SIGKILL
        listed = server.listed
    done = command("fit", f"--resume={run}")  # CFT is still to come
    assert done.returncode == 1
    assert f"the teacher m at {server.base_url} cannot be asked: " in done.stdout
    with ScriptedServer(server.brain, port=server.port) as server:
        monkeypatch.setenv("DIES_IN", "cft")
        monkeypatch.setenv("DIES_AT", "1")
        assert command("fit", f"--resume={run}").returncode == -signal.SIGKILL
    monkeypatch.delenv("DIES_IN")
    done = command("fit", f"--resume={run}")  # its critiques are made
    assert done.returncode == 0, done.stdout[-2000:]
    assert listed == server.listed == 1


@pytest.mark.long
def test_of_two_processes_one_asks_and_both_bridge(tmp_path: Path) -> None:
    brain = true_brain(make_problems("chain", "train", 32))
    with ScriptedServer(brain) as server:
        for devices in ("1", "2"):
            step = ["bridge", *CONFIG, *teacher(server, tmp_path / devices), f"--trainer.devices={devices}"]
            done = command(*step, f"--out={tmp_path / devices}.jsonl")
            assert done.returncode == 0, done.stdout[-2000:]
    assert max(server.counts.values()) == 2  # once for each of the two commands, whatever its processes
    chosen = [[row["chosen"]["text"] for row in rows(tmp_path / f"{devices}.jsonl")] for devices in ("1", "2")]
    assert chosen[0] == chosen[1]
