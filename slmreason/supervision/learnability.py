"""How learnable a trace is for a student, and how likely its answer: one forward pass over traces that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from slmreason.objectives import rank_surprisal
from slmreason.records import Example, Learnability, Problem, TraceScores
from slmreason.runtime.distributed import map_over_processes
from slmreason.student import Student
from slmreason.student.packing import collate, plan_batches

T = TypeVar("T")


@torch.no_grad()
def score_traces(
    problems: Sequence[Problem], texts: Sequence[str], student: Student, max_rank: int = 100, token_budget: int = 8192
) -> list[Learnability]:
    """Rank-surprisal ratio (arXiv 2601.14249) and mean NLL of each trace under the student, in packed batches.

    Args:
        problems: that of each trace.
        max_rank: ranks are capped here.
        token_budget: tokens of a batch.
    """

    def learnability(example: Example, ranks: Tensor, log_probs: Tensor) -> Learnability:
        ratio, mean_nll = rank_surprisal(ranks, log_probs, max_rank)
        return Learnability(ratio, mean_nll, len(ranks))

    return _scored(_examples(problems, texts, student), student, token_budget, learnability)


@torch.no_grad()
def trace_scores(
    problems: Sequence[Problem], texts: Sequence[str], student: Student, max_rank: int = 100, token_budget: int = 8192
) -> list[TraceScores]:
    """What rho is predicted from: the scores of each problem's trace under the student, its final answer's apart.

    Args: as of `score_traces`.
    """
    answers = {problem.id: problem.answer for problem in problems}

    def scores(example: Example, ranks: Tensor, log_probs: Tensor) -> TraceScores:
        ratio, mean_nll = rank_surprisal(ranks, log_probs, max_rank)
        start, end = answer_span(example.target_ids, answers[example.problem_id], student.decode)
        return TraceScores(
            problem_id=example.problem_id,
            mean_nll=mean_nll,
            rank_surprisal_ratio=min(ratio, torch.finfo(torch.float32).max),  # a file has no infinity
            answer_nll=float(-log_probs[start:end].double().sum()),
            num_tokens=len(ranks),
            cost=len(example),
            policy_version=student.policy_version,
        )

    return _scored(_examples(problems, texts, student), student, token_budget, scores)


def answer_span(ids: Sequence[int], answer: str, decode: Callable[[Sequence[int]], str]) -> tuple[int, int]:
    """Where the last mention of the answer stands among the tokens of a trace; its last line where there is none.

    Args:
        ids: of the trace.
        decode: tokens -> text.

    Returns:
        (its first token, the one behind its last).
    """
    size, wanted = len(ids), answer.strip()
    text = decode(ids)
    if not wanted or wanted not in text:
        wanted = text.rstrip().rpartition("\n")[2].strip()
    for start in range(size - 1, -1, -1):
        if wanted in decode(ids[start:]):
            ends = (end for end in range(start + 1, size + 1) if wanted in decode(ids[start:end]))
            return start, next(ends, size)
    return 0, size


def _examples(problems: Sequence[Problem], texts: Sequence[str], student: Student) -> list[Example]:
    return [
        Example(student.encode_problem(problem), student.encode_target(text), problem.id, "teacher")
        for problem, text in zip(problems, texts, strict=True)
    ]


def _scored(
    examples: Sequence[Example], student: Student, token_budget: int, of: Callable[[Example, Tensor, Tensor], T]
) -> list[T]:
    """`of(example, ranks, log_probs)` for each example, shared out over the processes."""
    with student.evaluating(), student.whole():
        return map_over_processes(lambda share: _share(share, student, token_budget, of), examples)


def _share(
    examples: Sequence[Example], student: Student, token_budget: int, of: Callable[[Example, Tensor, Tensor], T]
) -> list[T]:
    results: dict[int, T] = {}
    for members in plan_batches([len(example) for example in examples], token_budget):
        chosen = [examples[index] for index in members]
        packed = collate(chosen, student.pad_token_id, hidden_size=student.hidden_size, device_type=student.device.type)
        batch = packed.to(student.device)
        scores = student.score(batch, with_ranks=True)
        assert scores.ranks is not None
        sizes = batch.target_lengths.tolist()
        pieces = zip(batch.order, scores.ranks.split(sizes), scores.log_probs.split(sizes), strict=True)
        for position, ranks, log_probs in pieces:
            results[members[position]] = of(chosen[position], ranks, log_probs)
    return [results[index] for index in range(len(examples))]
