"""Problems to graded rollout groups. The probe, GRPO and the benchmarks all sample through this one function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slmreason.records import Problem, Rollout, RolloutGroup
from slmreason.rollout.engine import Completion, RolloutEngine, Sampling
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import map_over_processes, world_size
from slmreason.student import Student
from slmreason.verify.rewards import Answer, RewardFn, Verdict
from slmreason.verify.verdicts import graded_completions


@dataclass(frozen=True)
class Begun:
    """What completions of a problem follow."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] = ()
    """The last tokens of the prompt that are part of the answer, as it is graded: steps that were handed over."""


def collect(
    student: Student,
    engine: RolloutEngine,
    reward: RewardFn,
    problems: Sequence[Problem],
    group_size: int,
    sampling: Sampling,
    watch: Watch | None = None,
) -> list[RolloutGroup]:
    """Samples `group_size` completions of each problem and grades them, in the order of the problems.

    Several processes each sample a share of the problems, and all come to know all groups. `watch` counts what is
    sampled of this process's share times the number of processes.
    """
    if not problems:
        return []
    processes = world_size()

    def advance(completions: int, tokens: int) -> None:
        if watch is not None:
            watch.advance(completions * processes, tokens * processes)

    def sample(share: list[Problem]) -> list[RolloutGroup]:
        prompts = [student.encode_problem(problem) for problem in share]
        completions = engine.generate(student, prompts, group_size, sampling, advance)
        begun = [Begun(problem, prompt) for problem, prompt in zip(share, prompts, strict=True)]
        return graded_groups(student, reward, list(zip(begun, completions, strict=True)), group_size)

    groups = map_over_processes(sample, problems)
    if watch is not None:
        watch.grade(groups)
    return groups


def graded_groups(
    student: Student,
    reward: RewardFn,
    sampled: Sequence[tuple[Begun, Sequence[Completion]]],
    group_size: int,
) -> list[RolloutGroup]:
    """Groups of completions, graded in one call, so that the verifier's processes work side by side.

    Args:
        sampled: of each prompt its `group_size` completions; there may be none.
    """
    texts = [
        [student.decode_completion((*begun.answer_ids, *completion.token_ids)) for completion in group]
        for begun, group in sampled
    ]
    pairs = [(begun.problem, text) for (begun, _), row in zip(sampled, texts, strict=True) for text in row]
    truncated = [completion.truncated for _, group in sampled for completion in group]
    graded = graded_completions(reward, pairs, truncated)
    ids = [(*begun.answer_ids, *completion.token_ids) for begun, group in sampled for completion in group]
    answers = [Answer(problem, text, each) for (problem, text), each in zip(pairs, ids, strict=True)]
    verdicts = iter(reward.with_terms(answers, graded, group_size))
    return [
        RolloutGroup(
            begun.problem,
            tuple(
                _rollout(student, begun.prompt_ids, completion, text, next(verdicts))
                for completion, text in zip(group, row, strict=True)
            ),
        )
        for (begun, group), row in zip(sampled, texts, strict=True)
    ]


def _rollout(student: Student, prompt: tuple[int, ...], completion: Completion, text: str, verdict: Verdict) -> Rollout:
    return Rollout(
        prompt_ids=prompt,
        completion_ids=completion.token_ids,
        sampler_log_probs=completion.log_probs,
        text=text,
        reward=verdict.reward,
        correct=verdict.correct,
        truncated=completion.truncated,
        policy_version=student.policy_version,
        scores=verdict.scores,
        extra=verdict.extra,
    )
