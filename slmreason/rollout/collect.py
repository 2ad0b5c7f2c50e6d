"""Problems to graded rollout groups. The probe, GRPO and the benchmarks all sample through this one function."""

from __future__ import annotations

from collections.abc import Sequence

from slmreason.records import Problem, Rollout, RolloutGroup
from slmreason.rollout.engine import Completion, RolloutEngine, Sampling
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import map_over_processes, world_size
from slmreason.student import Student
from slmreason.verify.rewards import Answer, RewardFn, Verdict
from slmreason.verify.verdicts import graded_completions


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
        texts = [[student.decode_completion(completion.token_ids) for completion in group] for group in completions]
        pairs = [(problem, text) for problem, row in zip(share, texts, strict=True) for text in row]
        truncated = [completion.truncated for group in completions for completion in group]
        # In one call, so that the verifier's processes work side by side.
        graded = graded_completions(reward, pairs, truncated)
        sampled = [completion.token_ids for group in completions for completion in group]
        answers = [Answer(problem, text, ids) for (problem, text), ids in zip(pairs, sampled, strict=True)]
        verdicts = iter(reward.with_terms(answers, graded, group_size))
        return [
            RolloutGroup(
                problem,
                tuple(
                    _rollout(student, prompt, completion, text, next(verdicts))
                    for completion, text in zip(group, row, strict=True)
                ),
            )
            for problem, prompt, group, row in zip(share, prompts, completions, texts, strict=True)
        ]

    groups = map_over_processes(sample, problems)
    if watch is not None:
        watch.grade(groups)
    return groups


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
