"""What a fit trains on where a module and a data module meet in a plain Trainer, without rounds, Bridge and teacher."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slmreason.data.batches import PackedDataset, packed_batches
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.order import DrawnBatch
from slmreason.data.strata import Strata
from slmreason.modules.settings import GRPOSettings
from slmreason.modules.validation import ValidatedModule
from slmreason.records import Example, Fault, Place, Problem, counted
from slmreason.rollout.engine import PromptLimit, prompt_limit
from slmreason.student import Student
from slmreason.student.packing import PromptBatch
from slmreason.supervision.checks import usable_solution
from slmreason.verify.rewards import AnswerReward, RewardFn

log = logging.getLogger(__name__)


def load(data: ReasoningDataModule, student: Student, longest: PromptLimit | None = None) -> None:
    """Reads the pool and its evidence, once. No benchmark is known here, so none is taken out of the pool.

    Raises:
        ValueError: the pool cannot be read, or every problem of it was rejected.
    """
    if not data.problems:
        data.load(student.prompt_length, {}, longest)
        data.ledger.take(data.given_evidence, Place(0, "stratify"))


def room_for_answers(module: ValidatedModule) -> PromptLimit | None:
    """The longest prompt that leaves room for the answer of a validation; None where there is no validation."""
    if module.validation is None:
        return None
    tokens = module.validation.sampling.max_new_tokens
    return prompt_limit(module.student, module.validation.engine, tokens, f"{tokens} tokens of an answer")


def not_mastered(strata: Strata) -> list[Problem]:
    """All problems but those that the evidence shows to be mastered; what was never sampled is among them."""
    return [*strata.unknown, *strata.medium, *strata.hard]


@dataclass
class ProblemsToSolve:
    """GRPO: what is not mastered, in steps of so many prompts."""

    place: Place
    settings: GRPOSettings

    def build(self, strata: Strata, epoch: int) -> list[Problem]:
        return not_mastered(strata)

    def batches(self, rows: Sequence[Any], data: ReasoningDataModule, epoch: int, accumulate: int) -> list[PromptBatch]:
        settings = self.settings
        return prompt_batches(rows, data, self.place, epoch, settings.prompts_per_step, settings.draws_at_each_step)


def prompt_batches(
    problems: Sequence[Problem],
    data: ReasoningDataModule,
    place: Place,
    epoch: int,
    prompts_per_step: int,
    drawn: bool = False,
) -> list[PromptBatch]:
    """Shuffles the problems of one epoch and cuts them into steps.

    Args:
        drawn: each step draws its problems when it begins (see `slmreason.data.order`); there are as many steps.
    """
    order = list(problems)
    data.rng("shuffle", place.round, place.stage, epoch).shuffle(order)
    if drawn:
        positions = {problem.id: position for position, problem in enumerate(data.problems)}
        key = f"{data.seed}/draw/{place.round}/{place.stage}/{epoch}"
        steps = math.ceil(len(order) / prompts_per_step)
        return [DrawnBatch(order, positions, prompts_per_step, key)] * steps
    return [PromptBatch(order[start : start + prompts_per_step]) for start in range(0, len(order), prompts_per_step)]


@dataclass
class DatasetTraces:
    """SFT: the solutions that came with what is not mastered, those that pass the checks."""

    place: Place
    student: Student
    reward: RewardFn = field(default_factory=AnswerReward)
    max_tokens: int = 512
    """A longer trace is rejected."""
    checked: dict[str, str | Fault] = field(default_factory=dict)
    """By problem id: its trace, or why that was rejected."""

    @property
    def faults(self) -> dict[str, Fault | None]:
        """By problem id: why its trace was rejected, None where it was not."""
        return {name: found if isinstance(found, Fault) else None for name, found in self.checked.items()}

    def build(self, strata: Strata, epoch: int) -> list[Example]:
        known = len(self.checked)
        found = [example for problem in not_mastered(strata) if (example := self.example(problem)) is not None]
        rejected = Counter(fault.kind for fault in self.faults.values() if fault is not None)
        if rejected and len(self.checked) > known:
            said = counted(rejected)
            log.info("traces: %d of %d problems have none to train on: %s", rejected.total(), len(self.checked), said)
        return found

    def example(self, problem: Problem) -> Example | None:
        """The problem with its trace; None where that was rejected."""
        if problem.id not in self.checked:
            self.checked[problem.id] = usable_solution(problem, self.student, self.max_tokens, self.reward)
        text = self.checked[problem.id]
        if isinstance(text, Fault):
            return None
        target = self.student.encode_target(text)
        return Example(self.student.encode_problem(problem), target, problem.id, "teacher")

    def batches(self, rows: Sequence[Any], data: ReasoningDataModule, epoch: int, accumulate: int) -> PackedDataset:
        return packed_batches(rows, data, epoch, accumulate, self.student, self.place)
