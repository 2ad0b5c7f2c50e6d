"""CHORD's mix: how mu falls, and the loss of the step against plain Python."""

from __future__ import annotations

import pytest
import torch

from slmreason.modules.grpo import GRPOModule
from slmreason.modules.rescue.base import Added
from slmreason.modules.rescue.batches import TraceBatch
from slmreason.modules.rescue.chord import Chord, falling
from slmreason.modules.rescue.settings import RescueSettings
from slmreason.modules.settings import GRPOSettings
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward
from tests import reference
from tests.modules.rescue.made import group, step_of, traces_of, with_solutions
from tests.modules.rescue.test_gate import trace_log_probs


def test_mu_falls_along_half_a_cosine() -> None:
    values = [falling(0.5, 0.1, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert values == pytest.approx([0.5, 0.3 + 0.2 * 2**-0.5, 0.3, 0.3 - 0.2 * 2**-0.5, 0.1])
    assert falling(0.3, 0.3, 0.4) == pytest.approx(0.3)


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.1])
@pytest.mark.parametrize("share_done", [0.0, 0.6])
def test_the_loss_of_a_step_is_the_mix(student: Student, share_done: float, entropy_bonus: float) -> None:
    problems = with_solutions(4)
    rewards = [(0, 0, 0), (1, 0, 0), (1, 1, 1), (0, 1, 1)]
    groups = [group(student, problem, each) for problem, each in zip(problems, rewards, strict=True)]
    mu = falling(0.5, 0.05, share_done)
    added = Chord(student, traces_of(student), 0.5, 0.05)(step_of(*groups, share_done=share_done))
    assert [trace.problem_id for trace in added.traces] == [problem.id for problem in problems]
    assert added.metrics == {"rescued": 1.0, "without_trace": 0.0, "mu": mu}
    assert added.rescued == 1
    settings = GRPOSettings(rescue=RescueSettings("chord"), entropy_bonus=entropy_bonus)
    module = GRPOModule(student, HFEngine(), AnswerReward(), settings)
    batches = module.step_batches(groups, added)
    with torch.no_grad():
        ours = sum(float(module.loss_of(batch)) for batch in batches)
        policy = sum(float(module.loss_of(batch)) for batch in module.step_batches(groups, Added()))
        log_probs = trace_log_probs(student, [batch for batch in batches if isinstance(batch, TraceBatch)])
    assert len(log_probs) == 4
    assert ours == pytest.approx(reference.chord(policy, log_probs, mu), rel=1e-5)


def test_when_mu_is_0_there_is_no_trace_and_grpo_is_whole(student: Student) -> None:
    [problem] = with_solutions(1)
    added = Chord(student, traces_of(student), 0.5, 0.0)(step_of(group(student, problem, (0, 0)), share_done=1.0))
    assert (added.traces, added.policy_scale, added.rescued) == ([], 1.0, 0)
