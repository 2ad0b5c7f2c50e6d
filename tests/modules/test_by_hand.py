"""A module and a data module in a plain Trainer: what each needs of the other it finds there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.sources import Columns
from slmreason.embedded.families import make_problems
from slmreason.modules.by_hand import DatasetTraces
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.record import RecordRollouts
from slmreason.modules.settings import GRPOSettings, ValidationSettings
from slmreason.modules.sft import SFTModule
from slmreason.modules.validation import Validation
from slmreason.records import Fault, Place, Problem
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.student.packing import PromptBatch
from slmreason.verify.rewards import AnswerReward, Verdict

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                         "enable_model_summary": False, "accelerator": "cpu"}  # fmt: skip
POOL = "embedded:chain/train?count=6"


def grpo(student: Student) -> GRPOModule:
    settings = GRPOSettings(learning_rate=1e-4, group_size=2, max_completion_tokens=60, prompts_per_step=3)
    return GRPOModule(student, HFEngine(), AnswerReward(), settings)


def attempts(data: ReasoningDataModule, problem: Problem) -> int:
    """Of the newest evidence of a problem."""
    difficulty = data.ledger.get(problem.id)
    return difficulty.attempts if difficulty is not None else 0


def test_grpo_trains_on_the_pool_and_its_rollouts_are_the_evidence_of_the_next_epoch(student: Student) -> None:
    data = ReasoningDataModule(POOL)
    trainer = L.Trainer(max_epochs=2, **QUIET)
    trainer.fit(grpo(student), datamodule=data)
    assert len(data.problems) == 6
    assert all(attempts(data, problem) == 2 for problem in data.problems)
    assert set(data.band_of) == {problem.id for problem in data.problems}
    assert sum(isinstance(callback, RecordRollouts) for callback in trainer.callbacks) == 1  # type: ignore[attr-defined]


def test_grpo_is_validated_with_its_own_engine_on_what_is_held_out(student: Student) -> None:
    data = ReasoningDataModule("embedded:chain/train?count=24", holdout=0.25)
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(grpo(student), datamodule=data)
    right = float(trainer.callback_metrics["val/pass@1"]) * len(data.holdout)
    assert right == pytest.approx(round(right))
    assert trainer.callback_metrics["val/tokens"] > 0
    assert not any(problem.id in data.ledger for problem in data.holdout)


def test_a_student_is_validated_without_a_fit_and_can_be_trained_afterwards(student: Student) -> None:
    data, module = ReasoningDataModule("embedded:chain/train?count=24", holdout=0.25), grpo(student)
    trainer = L.Trainer(max_epochs=1, **QUIET)
    [found] = trainer.validate(module, datamodule=data, verbose=False)
    assert found["val/tokens"] > 0
    trainer.fit(module, datamodule=data)
    assert student.policy_version > 0


def test_sft_is_validated_where_it_has_what_that_takes_and_says_so_where_it_does_not(
    student: Student, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sums.jsonl"
    sums = [{"question": f"What is {a} + 3?", "worked": f"{a} + 3 = {a + 3}\n#### {a + 3}"} for a in range(2, 8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    shown = []
    for validation in (None, Validation.of(HFEngine(), AnswerReward(), max_new_tokens=40)):
        module = SFTModule(student)
        module.validation = validation
        trainer = L.Trainer(max_epochs=2, **QUIET)
        with caplog.at_level("INFO", logger="slmreason"):
            trainer.fit(module, datamodule=ReasoningDataModule(str(path), columns=COLUMNS, holdout=0.3))
        shown.append("val/pass@1" in trainer.callback_metrics)
    assert shown == [False, True]
    assert caplog.text.count("sft: there is no validation: module.validation says with what") == 1


def test_validation_draws_no_random_number_and_costs_no_tokens(student: Student) -> None:
    module = grpo(student)
    module.validation = Validation.of(HFEngine(), DrawsReward(), 20, ValidationSettings(samples=2))
    torch.manual_seed(1)
    before, cost = torch.get_rng_state(), replace(student.tokens)
    student.train()
    module.on_validation_start()
    module.validation_step(PromptBatch(make_problems("chain", "test", 3)), 0)
    assert module.tally.problems == 3
    assert module.tally.tokens >= 9
    assert torch.equal(torch.get_rng_state(), before)
    assert student.tokens == cost
    assert student.network.training


class DrawsReward(AnswerReward):
    """Moves the generator that everybody shares."""

    def __call__(self, problem: Problem, text: str) -> Verdict:
        torch.rand(1)
        return super().__call__(problem, text)

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        torch.rand(1)
        return super().grade(pairs)


def test_a_recorder_that_is_there_is_left_alone(student: Student) -> None:
    data = ReasoningDataModule(POOL)
    mine = RecordRollouts(data.ledger, Place(7, "grpo"))
    trainer = L.Trainer(max_epochs=1, callbacks=[mine], **QUIET)
    trainer.fit(grpo(student), datamodule=data)
    found = [callback for callback in trainer.callbacks if isinstance(callback, RecordRollouts)]  # type: ignore[attr-defined]
    assert found == [mine]


def write_bands(path: Path, mastered: Problem) -> Path:
    row = {"problem_id": mastered.id, "question": mastered.question, "answer": mastered.answer, "attempts": 4}
    path.write_text(json.dumps({**row, "successes": 4}) + "\n")
    return path


def test_what_the_evidence_shows_to_be_mastered_is_not_trained_on(student: Student, tmp_path: Path) -> None:
    mastered = make_problems("chain", "train", 6)[0]
    data = ReasoningDataModule(POOL, evidence=str(write_bands(tmp_path / "bands.jsonl", mastered)))
    L.Trainer(max_epochs=1, **QUIET).fit(grpo(student), datamodule=data)
    sampled = {problem.id for problem in data.problems if attempts(data, problem) == 2}
    assert sampled == {problem.id for problem in data.problems} - {mastered.id}
    assert attempts(data, mastered) == 4


SOLVED = [
    {"question": "What is 4 * 6?", "worked": "4 * 6 = 24\n#### 24"},
    {"question": "What is 3 * 5?", "worked": "3 * 5 = 16\n#### 15"},
]
COLUMNS = Columns(question="question", answer="worked", answer_format="hash")


@pytest.fixture
def solved(tmp_path: Path) -> Path:
    path = tmp_path / "solved.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SOLVED))
    return path


def test_sft_trains_on_the_solutions_that_pass_the_checks(student: Student, solved: Path) -> None:
    data = ReasoningDataModule(str(solved), columns=COLUMNS)
    L.Trainer(max_epochs=1, **QUIET).fit(SFTModule(student), datamodule=data)
    assert student.policy_version == 1
    target = student.encode_target("4 * 6 = 24\nThe answer is \\boxed{24}.")
    assert student.tokens.trained == len(student.encode_question(SOLVED[0]["question"])) + len(target)


def test_why_a_trace_was_rejected_is_known(student: Student) -> None:
    traces = DatasetTraces(Place(1, "sft"), student)
    problems = {
        "none": Problem("none", "What is 1 + 1?", "2"),
        "wrong": Problem("wrong", "What is 1 + 1?", "2", trace="1 + 1 = 3\n#### 3"),
        "open": Problem("open", "What is 1 + 1?", "2", trace="<think> one and one"),
    }
    assert [traces.example(problem) for problem in problems.values()] == [None] * 3
    assert traces.faults == {
        "none": Fault("the dataset has no solution of it"),
        "wrong": Fault("final answer does not verify"),
        "open": Fault("the dataset's solution cannot be used", "the block of thoughts never closes"),
    }


def test_sft_without_any_trace_is_an_error(student: Student) -> None:
    with pytest.raises(ValueError, match="there is nothing to train on"):
        L.Trainer(max_epochs=1, **QUIET).fit(SFTModule(student), datamodule=ReasoningDataModule(POOL))


def test_cft_needs_a_set_that_is_entered(student: Student) -> None:
    with pytest.raises(ValueError, match=r"cft: there is no set without a curriculum; call data\.enter"):
        L.Trainer(max_epochs=1, **QUIET).fit(CFTModule(student), datamodule=ReasoningDataModule(POOL))


def test_one_data_module_serves_sft_and_then_grpo(student: Student, solved: Path) -> None:
    data = ReasoningDataModule(str(solved), columns=COLUMNS)
    for module in (SFTModule(student), grpo(student)):
        L.Trainer(max_epochs=1, **QUIET).fit(module, datamodule=data)
    assert all(problem.id in data.ledger for problem in data.problems)
