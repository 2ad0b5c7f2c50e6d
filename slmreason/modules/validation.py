"""Validation within a fit: the student answers problems that are never trained on, for callbacks to watch.

It measures and changes nothing: no weight, no random number, no count of tokens that the run has cost.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from slmreason.modules.settings import ValidationSettings
from slmreason.records import Problem, RolloutGroup
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import RolloutEngine, Sampling
from slmreason.student import Student
from slmreason.student.packing import PromptBatch
from slmreason.verify.rewards import RewardFn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """With what a fit is validated."""

    engine: RolloutEngine
    reward: RewardFn
    """Says which answers are right."""
    sampling: Sampling
    """How the further completions are drawn; `val/pass@1` is greedy, with the same limit of tokens."""
    settings: ValidationSettings

    @classmethod
    def of(
        cls,
        engine: RolloutEngine,
        reward: RewardFn,
        max_new_tokens: int,
        settings: ValidationSettings | None = None,
        seed: int = 0,
    ) -> Validation:
        """
        Args:
            max_new_tokens: a completion is cut here.
            seed: of the further completions.
        """
        settings = settings or ValidationSettings()
        sampling = Sampling(max_new_tokens, settings.temperature, seed=seed, with_log_probs=False)
        return cls(engine, reward.verifier, sampling, settings)

    @property
    def problems_per_batch(self) -> int:
        """How many problems a batch has."""
        return self.settings.problems_per_batch

    def answers(self, student: Student, problems: Sequence[Problem]) -> Answers:
        """Samples and grades; several processes share the problems, and all come to know the numbers.

        The engine must have the student's weights as they are.
        """
        greedy = replace(self.sampling, temperature=0.0)
        first = collect(student, self.engine, self.reward, problems, group_size=1, sampling=greedy)
        if self.settings.samples == 1:
            return Answers(first, [])
        further = collect(student, self.engine, self.reward, problems, self.settings.samples, self.sampling)
        return Answers(first, further)


@dataclass(frozen=True)
class Answers:
    """What the student answered: greedily, and in further completions where those are asked for."""

    greedy: list[RolloutGroup]
    further: list[RolloutGroup]


@dataclass
class Tally:
    """What one validation has come to so far, over all processes."""

    problems: int = 0
    right: int = 0
    """Problems whose greedy answer is right."""
    solved: int = 0
    """Problems that one of the further completions solves."""
    tokens: int = 0

    def add(self, answers: Answers) -> None:
        """Counts the answers to a batch of problems."""
        self.problems += len(answers.greedy)
        self.right += sum(group.num_correct for group in answers.greedy)
        self.solved += sum(group.num_correct > 0 for group in answers.further)
        self.tokens += sum(group.num_tokens for group in (*answers.greedy, *answers.further))

    def metrics(self, samples: int) -> dict[str, float]:
        """What is logged.

        Args:
            samples: further completions of a problem; 1 for none.
        """
        values = {"val/pass@1": self.right / self.problems, "val/tokens": float(self.tokens)}
        if samples > 1:
            values[f"val/pass@{samples}"] = self.solved / self.problems
        return values


class ValidatedModule(L.LightningModule):
    """A module whose student is validated where Lightning's Trainer asks for it: the same in all three stages."""

    stage: str
    student: Student
    validation: Validation | None = None
    """With what; None where the fit has no validation."""
    tally = Tally()
    """Of the newest validation."""

    def on_validation_start(self) -> None:
        self.tally = Tally()
        if self.validation is not None:
            self.validation.engine.sync(self.student)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answers a batch of problems, which is the same in every process.

        Raises:
            RuntimeError: there is nothing to sample and grade with.
        """
        if self.validation is None:
            raise RuntimeError(f"{self.stage}: no validation without an engine and a reward; set module.validation")
        # `Trainer.validate` is in inference mode, and what is cached of the weights there could not be trained with.
        with isolate_rng(), torch.inference_mode(False), torch.no_grad():
            self.tally.add(self.validation.answers(self.student, batch.problems))

    def on_validation_epoch_end(self) -> None:
        tally = self.tally
        if self.validation is None or not tally.problems:
            return
        # Every process knows all answers: their mean over the processes is the number itself.
        for name, value in tally.metrics(self.validation.settings.samples).items():
            self.log(name, value, sync_dist=True, prog_bar="pass@" in name)
        if not self.trainer.sanity_checking:
            log.info(
                "%s, epoch %d, step %d: %d of %d held-out problems right (val/pass@1 %.3f), %d tokens to find out",
                self.stage,
                self.trainer.current_epoch + 1,
                self.trainer.global_step,
                tally.right,
                tally.problems,
                tally.right / tally.problems,
                tally.tokens,
            )
