"""Problems to graded groups."""

from __future__ import annotations

from slmreason.records import Problem, Turn
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward


def test_the_prompt_that_is_sampled_from_holds_what_was_said_before(student: Student) -> None:
    turns = (Turn("system", "Add."), Turn("user", "1 + 1 = ?"), Turn("assistant", "2"))
    problems = [Problem("after", "2 + 3 = ?", "5", turns=turns), Problem("alone", "2 + 3 = ?", "5")]
    sampling = Sampling(max_new_tokens=4, temperature=1.0, top_p=1.0, seed=0, with_log_probs=False)
    engine = HFEngine()
    engine.sync(student)
    after, alone = collect(student, engine, AnswerReward(), problems, 1, sampling)
    assert after.rollouts[0].prompt_ids == student.encode_problem(problems[0])
    assert alone.rollouts[0].prompt_ids == student.encode_question("2 + 3 = ?")
    assert len(after.rollouts[0].prompt_ids) > len(alone.rollouts[0].prompt_ids)
