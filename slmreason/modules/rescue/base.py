"""What a rescue is told of a step, and what it adds to it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from slmreason.modules.rescue.traces import VerifiedTraces
from slmreason.records import Example, Fault, Problem, RolloutGroup, counted
from slmreason.rollout.engine import Sampling
from slmreason.run.progress import Watch
from slmreason.student import Student

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledStep:
    """A GRPO step whose groups have been sampled; every process has the same."""

    groups: Sequence[RolloutGroup]
    """Silent ones too."""
    sampling: Sampling
    """How further rollouts of this step are drawn."""
    share_done: float
    """How much of the fit had been done before it, within 0 and 1."""
    watch: Watch | None = None
    """Is told of rollouts while they are sampled."""

    @property
    def failed(self) -> list[Problem]:
        """Problems that no rollout solved."""
        return [group.problem for group in self.groups if group.all_zero]


@dataclass(frozen=True)
class WeighedTrace:
    """A trace that the step has an SFT loss on."""

    example: Example
    weight: float
    """Of each of its target tokens in the loss of the step."""

    @property
    def problem_id(self) -> str:
        return self.example.problem_id

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.example.prompt_ids

    @property
    def target_ids(self) -> tuple[int, ...]:
        return self.example.target_ids


@dataclass(frozen=True)
class Added:
    """What a rescue adds to a step."""

    groups: Sequence[RolloutGroup] = ()
    """Trained on beside those of the step. Their prompts hold a part of the solution, so they are no evidence."""
    traces: Sequence[WeighedTrace] = ()
    policy_scale: float | None = None
    """What the policy loss of the step is multiplied by; None for 1."""
    rescued: int = 0
    """Problems without a right rollout that the step trains on all the same."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of this step, logged as `grpo/rescue/NAME`."""


class Rescue(ABC):
    """An option for what no rollout of a step solved; a new one for each fit."""

    def __init__(self, student: Student, traces: VerifiedTraces) -> None:
        self.student, self.traces = student, traces
        self._has_said_without = False

    @abstractmethod
    def add(self, step: SampledStep, traces: Mapping[str, str]) -> Added:
        """What it adds to a step; every process must call it, and gets the same.

        Args:
            traces: by problem id, of those of `wanted` that have one.
        """

    def wanted(self, step: SampledStep) -> list[Problem]:
        """Problems whose traces it takes."""
        return step.failed

    def __call__(self, step: SampledStep) -> Added:
        """Looks up the traces of a step, says the first time which are missing, and gives what is added to the step."""
        found = self.traces.of(self.wanted(step))
        faults = [fault for fault in found.values() if isinstance(fault, Fault)]
        self._say_without(faults, len(found))
        added = self.add(step, {name: text for name, text in found.items() if isinstance(text, str)})
        shares = {"rescued": (added.rescued, len(step.failed)), "without_trace": (len(faults), len(found))}
        metrics = {name: count / of for name, (count, of) in shares.items() if of}
        return replace(added, metrics={**metrics, **added.metrics})

    def example(self, problem: Problem, trace: str) -> Example:
        """A problem with its trace as SFT has it."""
        return Example(self.student.encode_problem(problem), self.student.encode_target(trace), problem.id, "rescue")

    def _say_without(self, faults: Sequence[Fault], wanted: int) -> None:
        """Says it the first time in a fit: `grpo/rescue/without_trace` has the share of every step."""
        if self._has_said_without or not faults:
            return
        self._has_said_without = True
        said = counted(Counter(fault.kind for fault in faults))
        log.info("grpo.rescue: %d of %d problems of this step have no trace to be rescued with: %s; SFT before, "
                 "bridge.traces or a data set with solutions gives them one. The share of later steps is logged as "
                 "grpo/rescue/without_trace", len(faults), wanted, said)  # fmt: skip
