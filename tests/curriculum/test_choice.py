"""What a stage hands on: how its student is compared with the one before, and how far it has gone from the base."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from slmreason.cli import main
from slmreason.curriculum.choice import check_choice, metric_of
from slmreason.curriculum.heldout import HeldOut, completion_log_probs, sampled_kl
from slmreason.curriculum.resume import newest_checkpoint
from slmreason.curriculum.settings import CheckpointSettings, CurriculumSettings
from slmreason.curriculum.work import Work
from slmreason.embedded.families import make_problems
from slmreason.modules.settings import ValidationSettings
from slmreason.modules.validation import Validation
from slmreason.records import Example
from slmreason.rollout.transformers import HFEngine
from slmreason.run.files import read_lines
from slmreason.run.folder import RunFolder
from slmreason.run.journal import Unnoted
from slmreason.student import Student
from slmreason.verify import AnswerReward
from tests.runs import Run, command

PROBLEMS = make_problems("chain", "test", 6)
BEST = CurriculumSettings(keep="best")


def test_the_estimate_is_the_divergence_of_the_whole_distributions_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    base, new = (torch.randn(7, generator=generator).log_softmax(-1) for _ in range(2))
    tokens = torch.multinomial(base.exp(), 200_000, replacement=True, generator=generator)
    exact = float((base.exp() * (base - new)).sum())
    assert sampled_kl(base[tokens], new[tokens]) == pytest.approx(exact, rel=0.02)
    assert sampled_kl(new[:0], new[:0]) == sampled_kl(base, base) == 0
    assert sampled_kl(base[:1], new[:1]) > 0


def logits_of(student: Student, example: Example) -> torch.Tensor:
    """Log-probabilities of every token at each place of the target: [target, vocab], by transformers alone."""
    ids = torch.tensor([[*example.prompt_ids, *example.target_ids]])
    with torch.no_grad():
        logits = student.network(input_ids=ids).logits[0]
    return logits[len(example.prompt_ids) - 1 : -1].float().log_softmax(-1)


def test_log_probs_are_those_of_a_plain_forward_pass(student: Student) -> None:
    texts = ["2 + 3 = 5\nThe answer is 5.", "7", "1 + 1 = 2\n2 + 2 = 4\nThe answer is 4."]
    examples = [
        Example(student.encode_problem(problem), student.encode_target(text), problem.id, "teacher")
        for problem, text in zip(PROBLEMS, texts, strict=False)
    ]
    ours = completion_log_probs(examples, student, token_budget=90)
    for example, log_probs in zip(examples, ours, strict=True):
        every = logits_of(student, example)
        theirs = every.gather(1, torch.tensor(example.target_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(log_probs), theirs, rtol=1e-4, atol=1e-5)


def held_out(folder: Path, student: Student) -> HeldOut:
    work = Work(student, HFEngine(), Unnoted(), CheckpointSettings(), Console(quiet=True))
    validation = Validation.of(work.engine, AnswerReward(), 60, ValidationSettings(samples=4), seed=1)
    return HeldOut(work, validation, PROBLEMS, RunFolder(folder), token_budget=500)


def test_the_base_is_at_0_and_a_changed_student_where_its_distributions_are(student: Student, tmp_path: Path) -> None:
    measured = held_out(tmp_path, student)
    measured.keep_base()
    assert measured.divergence() == 0
    rows = list(read_lines(RunFolder(tmp_path).base_completions))
    assert [row["problem_id"] for row in rows] == [problem.id for problem in PROBLEMS]
    examples = [Example(tuple(r["prompt_ids"]), tuple(r["completion_ids"]), r["problem_id"], "base") for r in rows]
    before = torch.cat([logits_of(student, example) for example in examples])
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    after = torch.cat([logits_of(student, example) for example in examples])
    exact = float((before.exp() * (before - after)).sum(-1).mean())
    assert exact > 0.01
    assert measured.divergence() == pytest.approx(exact, rel=0.5)  # of some hundred tokens, each drawn once


def test_metrics_are_those_that_a_fit_logs(student: Student, tmp_path: Path) -> None:
    measured = held_out(tmp_path, student)
    found = measured.metrics("x")
    answers = measured.validation.answers(student, PROBLEMS)
    assert found == {
        "val/pass@1": sum(group.num_correct for group in answers.greedy) / 6,
        "val/pass@4": sum(group.num_correct > 0 for group in answers.further) / 6,
    }
    assert student.tokens.total == 0


# -- the keys ----------------------------------------------------------------------------------------------------------


def test_sft_is_compared_by_what_one_of_k_solves() -> None:
    assert [metric_of(stage, BEST, 8) for stage in ("sft", "grpo", "cft")] == ["val/pass@8", "val/pass@1", "val/pass@1"]
    by = CurriculumSettings(keep="best", keep_by={"sft": "val/pass@1"})
    assert [metric_of(stage, by, 8) for stage in ("sft", "grpo")] == ["val/pass@1", "val/pass@1"]


@pytest.mark.parametrize(
    ("settings", "samples", "is_validated", "says"),
    [
        ({}, 8, False, "set data.holdout or data.validation"),
        ({}, 1, True, "set validation.samples, such as 8"),
        (
            {"keep_by": {"sft": "val/pass@4"}},
            8,
            True,
            r"sft: there is no val/pass@4, but val/pass@1 and val/pass@8; val",
        ),
        ({"keep_by": {"grpo": "val/loss"}}, 8, True, "grpo: there is no val/loss"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    settings: dict[str, Any], samples: int, is_validated: bool, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        check_choice(CurriculumSettings(keep="best", **settings), samples, is_validated)
    check_choice(CurriculumSettings(), samples, is_validated)


def test_a_metric_for_nothing_and_an_unknown_stage_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keep_by: nothing is compared"):
        CurriculumSettings(keep_by={"sft": "val/pass@1"})
    with pytest.raises(ValueError, match=r"keep_by: there is no stage rl"):
        CurriculumSettings(keep="best", keep_by={"rl": "val/pass@1"})


# -- real runs ---------------------------------------------------------------------------------------------------------

FIT = [
    "fit", "--config=quickstart", "--data.train=embedded:chain/train?count=24", "--data.token_budget=1000",
    "--data.batch_size=4", "--data.routing=all", "--data.validation=embedded:chain/test?count=16",
    "--benchmarks=[]", "--curriculum.rounds=1",
    "--curriculum.probe.attempts=2", "--curriculum.probe.epoch_share=0", "--sft.epochs=1", "--sft.learning_rate=1e-3",
    "--grpo.group_size=4", "--grpo.prompts_per_step=8", "--grpo.max_completion_tokens=60", "--grpo.learning_rate=1e-4",
    "--curriculum.keep=best", "--validation.samples=3", "--trainer.limit_val_batches=0",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip
RUINOUS = ["--sft.learning_rate=0.05", "--sft.warmup_steps=0"]


def summary(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((run.folder / "summary.json").read_text())
    return rows


@pytest.mark.slow
def test_the_weights_of_before_are_taken_back_where_they_were_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run", "")
    assert main([*FIT, *RUINOUS, "--curriculum.stages=[sft]", f"--run_dir={run.folder}"]) == 0
    base, sft = summary(run)
    assert sft["kept"] == "before"
    assert sft["validated"]["val/pass@3"] < base["validated"]["val/pass@3"]
    assert sft["validated"]["val/kl"] > 0.1
    said = " ".join(capsys.readouterr().out.split())
    assert "round 1 sft: val/pass@3" in said
    assert "the weights of before are kept" in said
    for name, tensor in Student("embedded:qwen2").weights():
        assert torch.equal(run.weights[name], tensor), name
    found = newest_checkpoint(run.folder)
    assert found is not None
    with open(run.folder / "round-01" / "sft" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    steps = sum(bool(row["sft/loss_step"]) for row in rows)
    assert found[1].policy_version == steps + 1  # neither the fit's last student nor the base's number again
    assert [float(row["val/kl"]) for row in rows if row["val/kl"]] == [sft["validated"]["val/kl"]]
    assert sft["tokens"]["trained"] > 0


@pytest.mark.slow
def test_a_stage_that_does_no_harm_hands_on_what_it_has_made(tmp_path: Path) -> None:
    best, last = Run(tmp_path / "best", ""), Run(tmp_path / "last", "")
    gentle = [*FIT, "--sft.learning_rate=1e-7", "--curriculum.stages=[sft]"]
    assert main([*gentle, f"--run_dir={best.folder}"]) == 0
    assert main([*gentle, "--curriculum.keep=last", f"--run_dir={last.folder}"]) == 0
    assert summary(best)[1]["kept"] == "new"
    assert "kept" not in summary(last)[1]
    assert "validated" not in summary(last)[1]  # limit_val_batches is 0, and nothing is compared
    for name, tensor in best.weights.items():
        assert torch.equal(tensor, last.weights[name]), name
    assert best.rows("ledger.jsonl") == last.rows("ledger.jsonl")


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_is_cut_off_chooses_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*FIT, *RUINOUS, "--curriculum.stages=[sft,grpo]", "--curriculum.checkpoint.every_n_steps=1",
            "--trainer.callbacks+=tests.plugins.Dies"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = command(*args, f"--run_dir={whole}")
    assert done.returncode == 0, done.stdout[-3000:]
    for stage, batch in (("sft", 2), ("grpo", 1)):
        monkeypatch.setenv("DIES_IN", stage)
        monkeypatch.setenv("DIES_AT", str(batch))
        assert command(*args, f"--run_dir={cut}", "--resume=auto").returncode != 0
    monkeypatch.delenv("DIES_IN")
    done = command(*args, f"--run_dir={cut}", "--resume=auto")
    assert done.returncode == 0, done.stdout[-3000:]
    ours, theirs = Run(cut, ""), Run(whole, "")
    assert [(row.get("kept"), row["validated"]) for row in summary(ours)] == [
        (row.get("kept"), row["validated"]) for row in summary(theirs)
    ]
    assert summary(theirs)[1]["kept"] == "before"
    assert ours.rows("base_completions.jsonl") == theirs.rows("base_completions.jsonl")
    for name, tensor in ours.weights.items():
        assert torch.equal(tensor, theirs.weights[name]), name


@pytest.mark.slow
def test_the_page_shows_what_was_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*FIT, *RUINOUS, "--curriculum.stages=[sft]", f"--run_dir={run}"]) == 0
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "On held-out problems" in page
    assert "<th>val/kl</th>" in page
    assert "<td>before</td>" in page
