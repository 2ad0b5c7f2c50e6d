"""Hand-over groups: how much help, what is trained on, what it costs."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from slmreason.modules.grpo import GRPOModule
from slmreason.modules.rescue.base import SampledStep
from slmreason.modules.rescue.handover import HandoverGroups
from slmreason.modules.rescue.settings import RescueSettings
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Problem
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward
from tests.modules.rescue.made import STEPS, Numbered, group, step_of, traces_of, with_solutions
from tests.supervision.test_sampled import handed

SIZE = 4
WRONG = "The answer is \\boxed{-1}."


class Says:
    """Behind at least so many steps of its problem the samples of these numbers are right."""

    def __init__(self, problems: list[Problem], needs: list[int], right: tuple[int, ...] = (1, 3)) -> None:
        self.problems, self.needs, self.right = problems, needs, right

    def __call__(self, prompt: str, number: int) -> str:
        [(problem, need)] = [pair for pair in zip(self.problems, self.needs, strict=True) if pair[0].question in prompt]
        steps = handed(problem, prompt)
        assert steps is not None
        is_right = steps >= need and number in self.right
        return f"The answer is \\boxed{{{problem.answer}}}." if is_right else WRONG


def rescue_of(student: Student, engine: Any, **settings: Any) -> HandoverGroups:
    chosen = RescueSettings("handover", **settings)
    return HandoverGroups(student, traces_of(student), engine, AnswerReward(), chosen, SIZE)


def failed_step(student: Student, problems: list[Problem], **options: Any) -> SampledStep:
    return step_of(*(group(student, problem, (0,) * SIZE) for problem in problems), **options)


def test_a_group_follows_the_fewest_steps_that_lead_to_a_right_answer(student: Student) -> None:
    problems = with_solutions(3)
    engine = Numbered(Says(problems, needs=[1, 3, 9]))
    added = rescue_of(student, engine)(failed_step(student, problems))
    assert [each.problem for each in added.groups] == problems[:2]
    for found, problem, need in zip(added.groups, problems, (1, 3), strict=False):
        lines = (problem.trace or "").splitlines()
        steps = student.chat.text("\n".join(lines[:need]) + "\n")
        assert {each.prompt_ids for each in found.rollouts} == {student.encode_problem(problem) + steps}
        right = student.encode_target(f"The answer is \\boxed{{{problem.answer}}}.")
        wrong = student.encode_target(WRONG)
        assert [each.completion_ids for each in found.rollouts] == [wrong, right, wrong, right]
        assert [each.reward for each in found.rollouts] == [0, 1, 0, 1]
        assert found.rollouts[1].text == "\n".join([*lines[:need], f"The answer is \\boxed{{{problem.answer}}}."])
    assert added.rescued == 2
    assert added.metrics["rescued"] == pytest.approx(2 / 3)
    assert added.metrics["help"] == pytest.approx((1 / STEPS + 3 / STEPS) / 2)
    # Two continuations at each number of steps that is tried, of those that are open; then two more of each found.
    assert [samples for _, samples, _ in engine.calls] == [2, 2, 2, 2]
    assert [len(prompts) for prompts, *_ in engine.calls] == [3, 3, 1, 2]
    assert [sampling.first for *_, sampling in engine.calls] == [0, 0, 0, 2]
    assert {sampling.seed for *_, sampling in engine.calls} == {5}


def test_what_it_samples_is_counted(student: Student) -> None:
    problems = with_solutions(2)
    added = rescue_of(student, Numbered(Says(problems, needs=[2, 9])))(failed_step(student, problems))
    assert student.tokens.sampled == added.metrics["tokens"] > 0


def test_the_steps_are_in_the_prompt_and_carry_no_policy_gradient(student: Student) -> None:
    problems = with_solutions(1)
    step = failed_step(student, problems)
    added = rescue_of(student, Numbered(Says(problems, needs=[2])))(step)
    settings = GRPOSettings(group_size=SIZE, rescue=RescueSettings("handover"))
    module = GRPOModule(student, HFEngine(), AnswerReward(), settings)
    [batch] = module.step_batches(step.groups, added)  # type: ignore[arg-type]
    [found] = added.groups
    targets = batch.packed.target_ids.split(batch.packed.target_lengths.tolist())
    assert sorted(tuple(ids.tolist()) for ids in targets) == sorted(each.completion_ids for each in found.rollouts)


def test_a_group_that_is_right_throughout_is_not_trained_on(student: Student) -> None:
    problems = with_solutions(1)
    engine = Numbered(Says(problems, needs=[1], right=(0, 1, 2, 3)))
    added = rescue_of(student, engine)(failed_step(student, problems))
    assert (list(added.groups), added.rescued) == ([], 0)
    assert added.metrics["help"] == 1 / STEPS


def test_a_whole_group_may_be_sampled_at_each_number_of_steps(student: Student) -> None:
    problems = with_solutions(1)
    engine = Numbered(Says(problems, needs=[2]))
    added = rescue_of(student, engine, samples=SIZE)(failed_step(student, problems))
    assert {samples for _, samples, _ in engine.calls} == {SIZE}
    assert [len(each.rollouts) for each in added.groups] == [SIZE]


def test_groups_with_a_right_rollout_and_problems_without_a_trace_are_left_alone(student: Student) -> None:
    solved, failed = with_solutions(2)
    bare = Problem("bare", "What is 1 + 1?", "2")
    engine = Numbered(Says([failed], needs=[1]))
    step = step_of(group(student, solved, (0, 1)), group(student, failed, (0, 0)), group(student, bare, (0, 0)))
    added = rescue_of(student, engine)(step)
    assert [each.problem for each in added.groups] == [failed]
    assert added.metrics["without_trace"] == 0.5


def test_the_search_ends_with_its_budget_and_what_was_found_is_filled_up(student: Student) -> None:
    problems = with_solutions(4)
    engine = Numbered(Says(problems, needs=[1, 1, 1, 1]))
    added = rescue_of(student, engine, max_sampled_tokens=1)(failed_step(student, problems))
    # Four tokens are less than the first problem's two continuations.
    assert [len(prompts) for prompts, *_ in engine.calls] == [1, 1]
    assert [each.problem for each in added.groups] == problems[:1]


def test_steps_that_leave_no_room_are_not_tried_and_that_is_said_once(
    student: Student, caplog: pytest.LogCaptureFixture
) -> None:
    problems = with_solutions(2)
    engine = Numbered(Says(problems, needs=[1, 1]))
    room = student.max_length - max(map(student.prompt_length, problems))
    with caplog.at_level(logging.INFO, logger="slmreason"):
        added = rescue_of(student, engine)(failed_step(student, problems, tokens=room))
    assert engine.calls == []
    assert added.rescued == 0
    [said] = [record.getMessage() for record in caplog.records if "too long" in record.getMessage()]
    assert said.startswith("grpo.rescue: 2 of 2 hand-overs are not tried")
