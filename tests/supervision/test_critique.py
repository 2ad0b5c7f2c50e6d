"""Critiques: which attempts are picked, what is made of them, what is rejected."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from slmreason.embedded.families import make_problems
from slmreason.records import Diagnosis, Example, Problem, Rollout, RolloutGroup
from slmreason.student import Student
from slmreason.supervision.critique import (
    Critic,
    CritiqueSettings,
    capped,
    critique_examples,
    named_step,
    pick_attempts,
    prefix_before,
)
from slmreason.teacher.procedural import ProceduralTeacher
from slmreason.verify.answers import is_correct
from slmreason.verify.rewards import AnswerReward
from tests.supervision.solutions import spoiled

TEACHER, REWARD = ProceduralTeacher(), AnswerReward()


def rollout(text: str, right: bool = False, truncated: bool = False) -> Rollout:
    return Rollout((1,), tuple(range(len(text))), (), text, float(right), right, truncated, 0)


def failed_group(problem: Problem, texts: Sequence[str]) -> RolloutGroup:
    return RolloutGroup(problem, tuple(rollout(text) for text in texts))


def test_attempts_with_different_wrong_answers_are_picked_shortest_first() -> None:
    [problem] = make_problems("chain", "train", 1, (2,))
    group = failed_group(problem, [r"long way \boxed{5}", r"\boxed{5}", r"\boxed{6}", r"it is \boxed{7}"])
    assert pick_attempts(group, 2) == [r"\boxed{5}", r"\boxed{6}"]


def test_critique_makes_three_kinds_and_each_verifies(student: Student) -> None:
    problems = make_problems("chain", "train", 6, (3,))
    critic = Critic(TEACHER, student, REWARD, CritiqueSettings())
    records = critic.make([failed_group(problem, [spoiled(problem, 1)]) for problem in problems])
    assert len(records) == 6
    for record in records:
        assert record.kinds == ("diagnosis", "repair", "new_trace")
        assert record.attempt.startswith(record.prefix)
        assert record.prefix == record.attempt.splitlines(keepends=True)[0]
        assert is_correct(record.prefix + (record.repair or ""), record.problem.answer)
        diagnosis, repair, new_trace = critique_examples(record, student, record.kinds)
        prompt = student.tokenizer.decode(list(diagnosis.prompt_ids))
        assert record.problem.question in prompt
        assert record.attempt in prompt
        assert student.decode(diagnosis.target_ids).startswith("Step 2 is wrong.")
        assert student.decode(repair.target_ids) == record.repair
        assert new_trace.prompt_ids == student.encode_question(record.problem.question)


class BadTeacher(ProceduralTeacher):
    """Calls wrong answers right, names steps that are not there, repairs into the void."""

    def __init__(self, diagnosis: Diagnosis | None) -> None:
        self.diagnosis = diagnosis

    def locate(self, problems: Sequence[Problem], attempts: Sequence[str]) -> list[Diagnosis | None]:
        return [self.diagnosis] * len(problems)

    def repair(
        self, problems: Sequence[Problem], prefixes: Sequence[str], diagnoses: Sequence[Diagnosis]
    ) -> list[str | None]:
        return [r"2+2=5 so \boxed{1}"] * len(problems)


@pytest.mark.parametrize(
    ("diagnosis", "reason"),
    [
        (Diagnosis(1, "fine", "right"), "calls a wrong answer right"),
        (Diagnosis(99, "there"), "names a step that does not exist"),
        (None, "no diagnosis"),
        (Diagnosis(1, "wrong"), "repair: final answer does not verify"),
    ],
)
def test_what_a_bad_teacher_says_is_rejected_with_its_fault(
    student: Student, diagnosis: Diagnosis | None, reason: str
) -> None:
    [problem] = make_problems("chain", "train", 1, (3,))
    critic = Critic(BadTeacher(diagnosis), student, REWARD, CritiqueSettings())
    [record] = critic.make([failed_group(problem, [spoiled(problem, 0)])])
    assert any(reason in str(fault) for fault in record.rejected)
    assert "repair" not in record.kinds
    assert "new_trace" in record.kinds


def test_prefix_before_keeps_the_text_to_the_letter() -> None:
    assert prefix_before("a \n\n b\nc", 3) == "a \n\n b\n"
    assert prefix_before("a", 1) == ""
    assert prefix_before("a", 2) is None


@pytest.mark.parametrize(
    ("attempt", "number", "name"),
    [
        ("12 - 5 = 7\n7 + 3.5 = 11", 2, "Step 2"),
        ("3.5 + 1 = 4.5\n\n4.5 + 1 = 6", 2, "Step 2"),
        ("Sam has 34.\n1. Sam sells 24:\n34 - 24 = 20\n2. Sam buys 36.", 3, 'The step "34 - 24 = 20"'),
        ("1) 2 + 2 = 4\n2) 4 + 1 = 6", 2, 'The step "2) 4 + 1 = 6"'),
        ("**Step 1:** 2 + 2 = 5\nso \\boxed{5}", 1, 'The step "**Step 1:** 2 + 2 = 5"'),
        ("We sell them.\n\\[\n34 - 24 = 20\n\\]", 3, 'The step "34 - 24 = 20"'),
    ],
)  # fmt: skip
def test_a_step_has_a_number_where_lines_are_steps_and_else_its_words(attempt: str, number: int, name: str) -> None:
    assert named_step(attempt, number) == name


def test_a_cap_takes_from_every_problem_in_turn() -> None:
    examples = [Example((1,), (2,), f"p{i % 3}", kind) for kind in ("repair", "diagnosis") for i in range(9)]
    kept = capped(examples, 4)
    for kind in ("repair", "diagnosis"):
        mine = [example.problem_id for example in kept if example.origin == kind]
        assert sorted(mine) == ["p0", "p0", "p1", "p2"]
    assert capped(examples, None) == examples
