"""Problems to graded rollout groups. The probe, GRPO and the benchmarks all sample through this one function."""

from __future__ import annotations

from collections.abc import Sequence

from slmreason.records import Problem, Rollout, RolloutGroup
from slmreason.rollout.engine import Completion, Progress, RolloutEngine, Sampling
from slmreason.student import Student
from slmreason.verify.rewards import RewardFn


def collect(
    student: Student,
    engine: RolloutEngine,
    reward: RewardFn,
    problems: Sequence[Problem],
    group_size: int,
    sampling: Sampling,
    progress: Progress | None = None,
) -> list[RolloutGroup]:
    """Samples `group_size` completions of each problem and grades them, in the order of the problems."""
    if not problems:
        return []
    prompts = [student.encode_question(problem.question) for problem in problems]
    completions = engine.generate(student, prompts, group_size, sampling, progress)
    return [
        RolloutGroup(problem, tuple(_grade(student, reward, problem, prompt, completion) for completion in group))
        for problem, prompt, group in zip(problems, prompts, completions, strict=True)
    ]


def _grade(
    student: Student, reward: RewardFn, problem: Problem, prompt: tuple[int, ...], completion: Completion
) -> Rollout:
    text = student.decode(completion.token_ids)
    verdict = reward(problem, text)
    return Rollout(
        prompt_ids=prompt,
        completion_ids=completion.token_ids,
        sampler_log_probs=completion.log_probs,
        text=text,
        reward=verdict.reward,
        correct=verdict.correct,
        truncated=completion.truncated,
        policy_version=student.policy_version,
    )
