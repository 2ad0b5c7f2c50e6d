"""The SFT gate: who is supervised, and the loss of the step against plain Python."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from slmreason.modules.grpo import GRPOModule
from slmreason.modules.rescue.base import Added
from slmreason.modules.rescue.batches import TraceBatch
from slmreason.modules.rescue.gate import SFTGate, gate_weights
from slmreason.modules.rescue.settings import RescueSettings
from slmreason.modules.settings import GRPOSettings
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward
from tests import reference
from tests.modules.rescue.made import group, step_of, traces_of, with_solutions


def gate_module(student: Student, weight: float, token_budget: int = 8192) -> GRPOModule:
    rescue = RescueSettings("sft_gate", sft_weight=weight)
    module = GRPOModule(student, HFEngine(), AnswerReward(), GRPOSettings(rescue=rescue, loss="dapo"))
    module.token_budget = token_budget
    return module


def trace_log_probs(student: Student, batches: list[TraceBatch]) -> list[list[float]]:
    found = []
    for batch in batches:
        pieces = student.score(batch.packed).log_probs.split(batch.packed.target_lengths.tolist())
        found += [piece.tolist() for piece in pieces]
    return found


@pytest.mark.parametrize("token_budget", [10_000, 120])
def test_the_loss_of_a_step_is_the_mean_over_its_problems(student: Student, token_budget: int) -> None:
    problems = with_solutions(5)
    rewards = [(0, 0, 0), (1, 0, 0), (0, 0, 0), (1, 1, 1), (0, 1, 1)]
    groups = [group(student, problem, each) for problem, each in zip(problems, rewards, strict=True)]
    added = SFTGate(student, traces_of(student), weight=0.7)(step_of(*groups))
    assert [trace.problem_id for trace in added.traces] == [problems[0].id, problems[2].id]
    assert [trace.target_ids for trace in added.traces] == [
        student.encode_target(problem.trace or "") for problem in (problems[0], problems[2])
    ]
    assert (added.groups, added.rescued) == ((), 2)
    assert added.metrics == {"rescued": 1.0, "without_trace": 0.0}
    module = gate_module(student, 0.7, token_budget)
    batches = module.step_batches(groups, added)
    of_traces = [batch for batch in batches if isinstance(batch, TraceBatch)]
    assert (len(of_traces) > 1) == (token_budget == 120)
    with torch.no_grad():
        ours = sum(float(module.loss_of(batch)) for batch in batches)
        policy = sum(float(module.loss_of(batch)) for batch in module.step_batches(groups, Added()))
        log_probs = trace_log_probs(student, of_traces)
    assert len(log_probs) == 2
    assert ours == pytest.approx(reference.gated(policy, 2, log_probs, 0.7), rel=1e-5)


def test_the_weights_of_a_step_by_hand() -> None:
    scale, weights = gate_weights(informative=3, lengths=[10], weight=2.0)
    assert scale == 0.75
    assert weights == [2.0 / 40]
    assert gate_weights(informative=0, lengths=[4, 5], weight=1.0) == (0.0, [1 / 8, 1 / 10])


def test_a_step_without_a_failure_is_as_it_was(student: Student) -> None:
    [problem] = with_solutions(1)
    added = SFTGate(student, traces_of(student), 1.0)(step_of(group(student, problem, (0, 1))))
    assert added == Added()


def test_who_has_no_trace_is_left_to_the_harvest_and_that_is_said_once(
    student: Student, caplog: pytest.LogCaptureFixture
) -> None:
    solved, other = with_solutions(2)
    bare = replace(other, trace=None)
    gate = SFTGate(student, traces_of(student), 1.0)
    with caplog.at_level(logging.INFO, logger="slmreason"):
        for _ in range(2):
            added = gate(step_of(group(student, solved, (0, 0)), group(student, bare, (0, 0))))
    assert [trace.problem_id for trace in added.traces] == [solved.id]
    assert added.metrics == {"rescued": 0.5, "without_trace": 0.5}
    [said] = [record.getMessage() for record in caplog.records if "no trace" in record.getMessage()]
    assert "1 of 2 problems of this step have no trace to be rescued with" in said
    assert "the dataset has no solution of it (1)" in said
