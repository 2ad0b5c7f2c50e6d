"""How learnable a trace is for a student: rank-surprisal ratio and mean NLL, from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slmreason.objectives import rank_surprisal
from slmreason.records import Example, Learnability, Problem
from slmreason.runtime.distributed import map_over_processes
from slmreason.student import Student
from slmreason.student.packing import collate, plan_batches


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
    examples = [
        Example(student.encode_problem(problem), student.encode_target(text), problem.id, "teacher")
        for problem, text in zip(problems, texts, strict=True)
    ]
    with student.evaluating(), student.whole():
        return map_over_processes(lambda share: _score(share, student, max_rank, token_budget), examples)


def _score(examples: Sequence[Example], student: Student, max_rank: int, token_budget: int) -> list[Learnability]:
    results: dict[int, Learnability] = {}
    for members in plan_batches([len(example) for example in examples], token_budget):
        chosen = [examples[index] for index in members]
        packed = collate(chosen, student.pad_token_id, hidden_size=student.hidden_size, device_type=student.device.type)
        batch = packed.to(student.device)
        scores = student.score(batch, with_ranks=True)
        assert scores.ranks is not None
        sizes = batch.target_lengths.tolist()
        pieces = zip(batch.order, scores.ranks.split(sizes), scores.log_probs.split(sizes), strict=True)
        for position, ranks, log_probs in pieces:
            ratio, mean_nll = rank_surprisal(ranks, log_probs, max_rank)
            results[members[position]] = Learnability(ratio, mean_nll, len(ranks))
    return [results[index] for index in range(len(examples))]
