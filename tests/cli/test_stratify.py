"""`slmreason stratify`: bands from recorded rollouts and from new ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmreason.cli import main
from tests.runs import pool_with_traces


def test_stratify_takes_recorded_rollouts(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = real_data / "model_solutions" / "gsm8k_gpt3_4x1319.jsonl.gz"
    assert main(["stratify", f"--recorded={recorded}", f"--out={tmp_path / 'strata.jsonl'}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "agrees with 5276 of 5276 recorded labels" in shown
    assert all(band in shown for band in ("simple", "medium", "hard"))
    assert len((tmp_path / "strata.jsonl").read_text().splitlines()) == 1319


def test_stratify_probes_the_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "strata.jsonl"
    assert (
        main(["stratify", "--config", "quickstart", "--data.limit=12", "--curriculum.probe.attempts=4", f"--out={out}"])
        == 0
    )
    assert len(out.read_text().splitlines()) == 12
    assert "mean rho" in capsys.readouterr().out


def test_what_is_rejected_is_said_and_kept_beside_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, out = tmp_path / "pool.jsonl", tmp_path / "bands.jsonl"
    rows = [{"question": "What is 1 + 1?", "answer": "2"}, {"question": "", "answer": "3"}]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--config=quickstart", f"--data.train={pool}", "--curriculum.probe.attempts=1", "--benchmarks=[]",
            "--grpo.max_completion_tokens=8", "--trainer.enable_progress_bar=false", f"--out={out}"]  # fmt: skip
    assert main(["stratify", *args]) == 0
    assert "pool.jsonl, 1 rejected: column 'q" in capsys.readouterr().out
    kept = tmp_path / "bands.jsonl.rejects.jsonl"
    [reject] = [json.loads(line) for line in kept.read_text().splitlines()]
    assert "line 2" in reject["where"]
    with open(kept, "a") as file:
        file.write('{"id": "x", "where": "teacher solve", "reason": "no answer", "detail": {}}\n')
    before = kept.read_text()
    assert main(["stratify", *args]) == 0  # goes on, and leaves what an earlier call has kept
    assert kept.read_text() == before


def test_a_probe_in_waves_leaves_one_line_a_problem_and_is_not_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "strata.jsonl"
    args = ["stratify", "--config=quickstart", "--data.limit=24", "--data.bands.evidence_model=posterior",
            "--curriculum.probe.attempts=4", "--curriculum.probe.waves=[2,2]", "--curriculum.probe.screen=true",
            f"--out={out}"]  # fmt: skip
    assert main(args) == 0
    written = out.read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    assert len({row["problem_id"] for row in rows}) == len(rows) == 24
    assert {row["attempts"] for row in rows} == {2, 4}
    assert all(1 / 3 < row["certainty"] <= 1 for row in rows)
    assert "in their true band" in " ".join(capsys.readouterr().out.split())
    assert main(args) == 0
    assert "24 of 24 problems are in" in capsys.readouterr().out
    assert out.read_text() == written


def test_waves_that_never_stop_are_refused_by_their_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--config=quickstart", "--curriculum.probe.waves=[2,2,4]", f"--out={tmp_path / 'strata.jsonl'}"]
    assert main(["stratify", *args]) != 0
    assert "curriculum.probe.waves: [2, 2, 4] never stop early" in " ".join(capsys.readouterr().err.split())


def test_what_is_predicted_is_left_out_and_said_and_the_others_show_their_prior(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, out = pool_with_traces(tmp_path / "pool.jsonl", 120), tmp_path / "bands.jsonl"
    args = ["stratify", "--config=quickstart", f"--data.train={pool}", "--data.columns.trace=trace", "--benchmarks=[]",
            "--data.bands.evidence_model=posterior", "--curriculum.probe.attempts=4", "--grpo.max_completion_tokens=80",
            "--curriculum.probe.predictor=forward", "--curriculum.probe.certain=0.6", f"--out={out}"]  # fmt: skip
    assert main(args) == 0
    shown, written = " ".join(capsys.readouterr().out.split()), out.read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    assert "120 of 120 problems have a trace to predict from" in shown
    assert "rho predicted from traces: rank correlation" in shown
    assert 64 <= len(rows) < 120
    assert f"{120 - len(rows)} problems have no rollouts and no line in the file" in shown
    assert all(len(row["prior"]) == 2 and min(row["prior"]) > 0 for row in rows)
    assert len({tuple(row["prior"]) for row in rows}) > 10
    assert main(args) == 0
    assert "64 of 64 problems are in" in " ".join(capsys.readouterr().out.split())  # the first part of both calls
    assert out.read_text() == written


def test_a_predictor_that_could_do_nothing_is_refused_by_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["stratify", "--config=quickstart", "--curriculum.probe.predictor=forward", f"--out={tmp_path / 'a.jsonl'}"]
    assert main(args) != 0
    assert "curriculum.probe.predictor: bands by the newest evidence" in " ".join(capsys.readouterr().err.split())
    assert main([*args, "--data.bands.evidence_model=posterior", "--data.limit=70"]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "0 of 70 problems have a trace to predict from; 70 not: none came with them (data.columns.trace)" in said
