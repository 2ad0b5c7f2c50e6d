"""What a run knows of its student on the held-out problems: how many it solves, and how far it has gone from the base.

Nothing here is counted in what the run has cost, and nothing changes what it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from slmreason.curriculum.work import Work
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.validation import Answers, Tally, Validation
from slmreason.objectives import kl_penalty
from slmreason.records import Example, Problem, RolloutGroup
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.run.files import read_lines, write_records
from slmreason.run.folder import RunFolder
from slmreason.runtime.distributed import barrier, map_over_processes
from slmreason.student import Student
from slmreason.student.packing import collate, plan_batches

KL = "val/kl"


class HeldOut:
    """The held-out problems of a run, and its student's answers to them."""

    def __init__(
        self, work: Work, validation: Validation, problems: Sequence[Problem], files: RunFolder, token_budget: int
    ) -> None:
        """
        Args:
            token_budget: tokens of a batch that is scored.
        """
        self.work, self.validation, self.problems = work, validation, problems
        self.files, self.token_budget = files, token_budget

    def metrics(self, label: str) -> dict[str, float]:
        """`val/pass@1` and `val/pass@k` of the student as it stands, by the same draws as within a fit.

        Args:
            label: says at which point of the run.
        """
        samples, tally = self.validation.settings.samples, Tally()
        greedy = self._sample(
            f"validation after {label}, greedy", 1, replace(self.validation.sampling, temperature=0.0)
        )
        further: list[RolloutGroup] = []
        if samples > 1:
            further = self._sample(f"validation after {label}", samples, self.validation.sampling)
        tally.add(Answers(greedy, further))
        return {name: value for name, value in tally.metrics(samples).items() if name != "val/tokens"}

    def keep_base(self) -> None:
        """Keeps a sampled completion of each problem by the student as it stands, with its log-probabilities."""
        sampling = replace(self.validation.sampling, temperature=1.0)
        groups = self._sample("completions of the base on held-out problems", 1, sampling)
        examples = [
            Example(group.rollouts[0].prompt_ids, group.rollouts[0].completion_ids, group.problem.id, "base")
            for group in groups
            if group.rollouts[0].completion_ids
        ]
        scored = completion_log_probs(examples, self.work.student, self.token_budget)
        rows = [
            {"problem_id": example.problem_id, "prompt_ids": example.prompt_ids,
             "completion_ids": example.target_ids, "log_probs": log_probs}
            for example, log_probs in zip(examples, scored, strict=True)
        ]  # fmt: skip
        write_records(self.files.base_completions, rows)
        barrier()  # other processes read what the first has written

    def divergence(self) -> float:
        """KL(base || student) in nats a token, on the base's completions; 0 where it gave none."""
        rows = list(read_lines(self.files.base_completions))
        examples = [
            Example(tuple(row["prompt_ids"]), tuple(row["completion_ids"]), row["problem_id"], "base") for row in rows
        ]
        with isolate_rng():
            now = completion_log_probs(examples, self.work.student, self.token_budget)
        before = [value for row in rows for value in row["log_probs"]]
        return sampled_kl(torch.tensor(before), torch.tensor([value for each in now for value in each]))

    def _sample(self, key: str, samples: int, sampling: Sampling) -> list[RolloutGroup]:
        student, validation = self.work.student, self.validation
        validation.engine.sync(student)
        completions, longest = len(self.problems) * samples, sampling.max_new_tokens
        with isolate_rng(), self.work.watching(key, completions, longest, "validation") as watch:

            def make(part: list[Problem]) -> list[RolloutGroup]:
                return collect(student, validation.engine, validation.reward, part, samples, sampling, watch)

            return self.work.in_batches(key, self.problems, make, RolloutGroup, samples, watch)


def sampled_kl(base_log_probs: Tensor, new_log_probs: Tensor) -> float:
    """An estimate of KL(base || new) in nats a token, from log-probabilities of tokens that the base drew.

    The mean of Schulman's k3 (`objectives.kl_penalty`): never negative, and without bias at temperature 1.

    Args:
        base_log_probs, new_log_probs: [N] each, of the same tokens; 0 where there are none.
    """
    if not len(base_log_probs):
        return 0.0
    return float(kl_penalty(base_log_probs.double(), new_log_probs.double()).mean())


@torch.no_grad()
def completion_log_probs(examples: Sequence[Example], student: Student, token_budget: int) -> list[list[float]]:
    """Log-probability of each target token under the student, in float32. Every process comes to know all.

    Args:
        token_budget: tokens of a batch.
    """
    with student.evaluating(), student.whole():
        return map_over_processes(lambda share: _score(share, student, token_budget), examples)


def _score(examples: Sequence[Example], student: Student, token_budget: int) -> list[list[float]]:
    found: dict[int, list[float]] = {}
    for members in plan_batches([len(example) for example in examples], token_budget):
        chosen = [examples[index] for index in members]
        packed = collate(chosen, student.pad_token_id, hidden_size=student.hidden_size, device_type=student.device.type)
        batch = packed.to(student.device)
        pieces = student.score(batch).log_probs.split(batch.target_lengths.tolist())
        for position, log_probs in zip(batch.order, pieces, strict=True):
            found[members[position]] = log_probs.tolist()
    return [found[index] for index in range(len(examples))]


def held_out_of(
    data: ReasoningDataModule, validation: Validation | None, work: Work, files: RunFolder
) -> HeldOut | None:
    """What a run is validated on; None where nothing is held out, or nobody says how to ask it."""
    if validation is None or not data.holdout:
        return None
    return HeldOut(work, validation, data.holdout, files, data.token_budget)
