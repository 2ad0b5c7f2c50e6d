"""Steps and students made by hand, for rescues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slmreason.embedded.families import make_problems
from slmreason.modules.rescue.base import SampledStep
from slmreason.modules.rescue.traces import VerifiedTraces
from slmreason.records import Problem, Rollout, RolloutGroup
from slmreason.rollout.engine import Completion, Sampling
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward
from tests.supervision.scripted import ScriptedEngine
from tests.supervision.solutions import true_solution

STEPS = 5
"""Lines of each solution: four steps and the answer."""


def with_solutions(count: int) -> list[Problem]:
    """Problems whose solution came with them."""
    problems = make_problems("chain", "train", count, (4,))
    solved = [replace(problem, trace=true_solution(problem)) for problem in problems]
    assert {len((problem.trace or "").splitlines()) for problem in solved} == {STEPS}
    return solved


def group(student: Student, problem: Problem, rewards: Sequence[float]) -> RolloutGroup:
    """A group whose rollouts have these rewards."""
    prompt = student.encode_problem(problem)
    rollouts = []
    for number, reward in enumerate(rewards):
        text = f"{number} and {reward:g}"
        ids = student.encode_target(text)
        rollouts.append(Rollout(prompt, ids, (-0.1,) * len(ids), text, reward, reward > 0.5, False, 0))
    return RolloutGroup(problem, tuple(rollouts))


def step_of(*groups: RolloutGroup, share_done: float = 0.0, tokens: int = 80) -> SampledStep:
    return SampledStep(groups, Sampling(tokens, seed=5), share_done)


def traces_of(student: Student) -> VerifiedTraces:
    return VerifiedTraces(student, AnswerReward(), 512)


class Numbered(ScriptedEngine):
    """Its script is told which sample of the prompt this is over all calls, as an engine goes on behind the first."""

    def _said(self, student: Student, prompt: str, number: int, sampling: Sampling) -> Completion:
        said = super()._said(student, prompt, number + sampling.first, sampling)
        return replace(said, log_probs=(-1.0,) * len(said.token_ids))
