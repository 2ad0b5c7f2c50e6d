"""Hand-overs: the first steps of a worked solution, then the student's own continuation (arXiv 2506.17211)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from slmreason.records import Problem
from slmreason.rollout.engine import Completion, RolloutEngine, Sampling, prompt_limit
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import map_over_processes
from slmreason.student import Student

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handover:
    """What the student is to continue."""

    problem: Problem
    prefix: str
    """The steps that are handed over, with the line break that ends them."""


def first_steps(solution: str, share: float) -> str | None:
    """The first lines of a solution, at least one; None where nothing would be left to continue with.

    Args:
        share: of its lines.
    """
    lines = solution.strip().splitlines()
    kept = max(1, int(len(lines) * share))
    return "\n".join(lines[:kept]) + "\n" if kept < len(lines) else None


def hand_over(
    handovers: Sequence[Handover],
    student: Student,
    engine: RolloutEngine,
    sampling: Sampling,
    watch: Watch | None = None,
) -> list[str | None]:
    """Steps and continuation of each hand-over as one text: all are continued in one batched generate.

    Returns:
        None where the steps are too long to be continued, or the continuation ran into the token limit.
    """
    if not handovers:
        return []
    longest = prompt_limit(student, engine, sampling.max_new_tokens, f"{sampling.max_new_tokens} new tokens")
    # The student's own tokens for prefix and continuation are joined as text, then encoded once as a target.
    prompts = [student.encode_problem(h.problem) + student.chat.text(h.prefix) for h in handovers]
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= longest.tokens]
    if len(fitting) < len(prompts):
        log.warning("bridge: %d of %d hand-overs are not tried, the teacher's steps are too long: %s; lower "
                    "bridge.handover_share or bridge.max_trace_tokens", len(prompts) - len(fitting), len(prompts),
                    longest.why)  # fmt: skip
    engine.sync(student)
    progress = None if watch is None else watch.advance

    def sample(share: list[tuple[int, ...]]) -> list[list[Completion]]:
        return engine.generate(student, share, 1, sampling, progress)

    completions = map_over_processes(sample, [prompts[index] for index in fitting])
    texts: list[str | None] = [None] * len(handovers)
    for index, [completion] in zip(fitting, completions, strict=True):
        student.tokens.sampled += len(completion.token_ids)
        if not completion.truncated:
            texts[index] = handovers[index].prefix + student.decode(completion.token_ids)
    return texts
