"""Whole fits that rescue: what is logged, what is evidence, what is trained on, and a step that is computed again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from slmreason.callbacks import HarvestAllZeroGroups, SeedSteps
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.sources import Columns
from slmreason.modules.by_hand import ProblemsToSolve, load
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.nonfinite import load_bad_batch, repeat_bad_batch, save_bad_batch
from slmreason.modules.policy_batch import PolicyBatch
from slmreason.modules.record import RecordRollouts
from slmreason.modules.rescue.batches import TraceBatch
from slmreason.modules.rescue.chord import Chord
from slmreason.modules.rescue.settings import RescueSettings
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Place, Problem
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward
from tests.modules.rescue.made import group, step_of, traces_of, with_solutions
from tests.modules.test_sampling import QUIET, Notes
from tests.supervision.solutions import true_solution

PLACE = Place(1, "grpo")
KINDS = ["handover", "sft_gate", "chord"]


@pytest.fixture
def pool(tmp_path: Path) -> str:
    """Problems with their solutions, most of them beyond the student."""
    path = tmp_path / "pool.jsonl"
    rows = [
        {"question": problem.question, "worked": f"{true_solution(problem)}\n#### {problem.answer}"}
        for problem in with_solutions(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def solution_of(problem: Problem) -> str:
    return f"So it is.\nThe answer is \\boxed{{{problem.answer}}}."


def fitted(
    pool: str, kind: Any, epochs: int = 1, bridged: bool = False, **options: Any
) -> tuple[Notes, ReasoningDataModule, GRPOModule]:
    student = Student("embedded:qwen2", instruction="")
    given = {"learning_rate": 1e-4, "group_size": 3, "max_completion_tokens": 80, "prompts_per_step": 4, **options}
    settings = GRPOSettings(rescue=RescueSettings(kind), **given)
    module = GRPOModule(student, HFEngine(), AnswerReward(), settings)
    data = ReasoningDataModule(pool, columns=Columns("question", "worked", answer_format="hash"))
    load(data, student)
    data.enter(ProblemsToSolve(PLACE, settings))
    if bridged:
        module.traces.chosen = {problem.id: solution_of(problem) for problem in data.problems}
    notes = Notes()
    callbacks = [SeedSteps("x"), RecordRollouts(data.ledger, PLACE), HarvestAllZeroGroups(data.ledger, PLACE), notes]
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, reload_dataloaders_every_n_epochs=1, **QUIET)
    trainer.fit(module, datamodule=data)
    return notes, data, module


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_rollout_solved_is_trained_on_and_stays_evidence_and_harvest(
    pool: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="slmreason"):
        notes, data, module = fitted(pool, kind)
    assert caplog.text.count("grpo.rescue: 12 of 12 problems have a trace that they may be rescued with") == 1
    rescued = [logged["grpo/rescue/rescued"] for logged in notes.logged if "grpo/rescue/rescued" in logged]
    assert max(rescued) > 0
    groups = [each for step in notes.steps for each in step]
    assert all(len(each.rollouts) == 3 for each in groups)
    prompts = {problem.id: module.student.encode_problem(problem) for problem in data.problems}
    assert all(rollout.prompt_ids == prompts[each.problem.id] for each in groups for rollout in each.rollouts)
    for each in groups:  # the newest evidence of a problem is that of its own group
        found = data.ledger.get(each.problem.id)
        assert found is not None
        assert (found.attempts, found.successes) == (3, each.num_correct)
    failed = {each.problem.id for each in groups if each.all_zero}
    assert {each.problem.id for each in data.ledger.harvested(1)} == failed
    own = sum(each.num_tokens for each in groups)
    more = sum(logged.get("grpo/rescue/tokens", 0.0) for logged in notes.logged)
    assert module.student.tokens.sampled == own + more
    assert (more > 0) == (kind == "handover")
    assert any("grpo/rescue/nll" in logged for logged in notes.logged) == (kind != "handover")


@pytest.mark.parametrize("kind", ["sft_gate", "chord"])
def test_a_step_in_which_nobody_was_right_is_an_update_all_the_same(pool: str, kind: str) -> None:
    notes, data, module = fitted(pool, kind, bridged=True, max_completion_tokens=2)  # nobody ends within two tokens
    assert not any(each.informative for step in notes.steps for each in step)
    assert module.student.policy_version == len(notes.steps) == 3
    assert all("grpo/rescue/nll" in logged and "grpo/entropy" not in logged for logged in notes.logged)
    lengths = [len(module.student.encode_target(solution_of(problem))) for problem in data.problems]
    prompts = [module.student.prompt_length(problem) for problem in data.problems]
    assert module.student.tokens.trained == sum(lengths) + sum(prompts)


def test_nothing_is_rescued_and_nothing_logged_by_default(pool: str) -> None:
    notes, _, module = fitted(pool, None)
    assert module.rescue is None
    assert not {name for logged in notes.logged for name in logged if "rescue" in name}


def test_mu_falls_from_step_to_step(pool: str) -> None:
    notes, _, _ = fitted(pool, "chord", epochs=2)
    values = [logged["grpo/rescue/mu"] for logged in notes.logged]
    assert values[0] == pytest.approx(0.5)
    assert len(values) >= 4
    assert values == sorted(values, reverse=True)
    assert 0.05 < values[-1] < 0.2


def test_where_there_is_no_trace_at_all_a_fit_says_so_when_it_begins(
    student: Student, caplog: pytest.LogCaptureFixture
) -> None:
    settings = GRPOSettings(
        group_size=2, max_completion_tokens=8, prompts_per_step=4, rescue=RescueSettings("handover")
    )
    module = GRPOModule(student, HFEngine(), AnswerReward(), settings)
    data = ReasoningDataModule("embedded:chain/train?count=4")
    with caplog.at_level(logging.INFO, logger="slmreason"):
        L.Trainer(max_epochs=1, **QUIET).fit(module, datamodule=data)
    [said] = [record for record in caplog.records if "may be rescued with" in record.getMessage()]
    assert said.levelno == logging.WARNING
    assert said.getMessage().startswith("grpo.rescue: 0 of 4 problems have a trace")


def test_a_step_with_traces_that_was_saved_has_its_loss_to_the_digit(student: Student, tmp_path: Path) -> None:
    problems = with_solutions(3)
    groups = [
        group(student, problem, rewards) for problem, rewards in zip(problems, [(0, 0), (0, 1), (1, 1)], strict=True)
    ]
    settings = GRPOSettings(rescue=RescueSettings("chord"))
    module = GRPOModule(student, HFEngine(), AnswerReward(), settings)
    added = Chord(student, traces_of(student), 0.5, 0.05)(step_of(*groups, share_done=0.3))
    batches = module.step_batches(groups, added)
    with torch.no_grad():
        loss = sum(float(module.loss_of(batch)) for batch in batches)
    about = {"stage": "grpo", "precision": "32-true"}
    save_bad_batch(tmp_path / "step.safetensors", student, batches, about)
    assert [type(batch) for batch in load_bad_batch(tmp_path / "step.safetensors").batches] == [PolicyBatch, TraceBatch]
    again = GRPOModule(Student("embedded:qwen2", instruction=""), HFEngine(), AnswerReward(), settings)
    assert repeat_bad_batch(tmp_path / "step.safetensors", again)[0] == pytest.approx(loss, rel=1e-6)
