"""Steps that draw their problems when they begin: refills, the end of an epoch, evidence, and a fit that goes on."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from slmreason.callbacks import HarvestAllZeroGroups, SeedSteps, TokenBudget
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.by_hand import ProblemsToSolve, load
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.record import RecordRollouts
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Place, Problem, RolloutGroup
from slmreason.rollout.engine import Completion, Progress, RolloutEngine, Sampling
from slmreason.student import Student
from slmreason.verify.rewards import RewardFn, Verdict

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                         "enable_model_summary": False, "accelerator": "cpu"}  # fmt: skip
PLACE = Place(1, "grpo")
POOL = "embedded:chain/train?count=24"


class Scripted(RolloutEngine):
    """Answers with two tokens, by the number in the group alone."""

    def sync(self, student: Student) -> None:
        """Nothing to do."""

    def generate(
        self,
        student: Student,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        return [[Completion((5 + n, 9), (-1.0, -1.0), truncated=False) for n in range(group_size)] for _ in prompts]


class EveryThird(RewardFn):
    """Of every third problem (by its question) half of the rollouts are right; of the others all or none."""

    def __init__(self, kinds: int = 3) -> None:
        self.kinds = kinds
        self.graded: Counter[str] = Counter()

    def __call__(self, problem: Problem, text: str) -> Verdict:
        number = self.graded[problem.id]
        self.graded[problem.id] += 1
        kind = zlib.crc32(problem.question.encode()) % self.kinds
        correct = (number % 2 == 0) if kind == 0 else kind == 1
        return Verdict(float(correct), correct)


class Notes(Callback):
    """The groups of each step, by the callbacks' own way."""

    def __init__(self) -> None:
        self.steps: list[list[RolloutGroup]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(outputs["rollout_groups"])
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fitted(
    settings: dict[str, Any], *callbacks: Callback, kinds: int = 3, epochs: int = 1
) -> tuple[Notes, ReasoningDataModule, GRPOModule, L.Trainer]:
    student = Student("embedded:qwen2", instruction="")
    given = {"learning_rate": 1e-3, "group_size": 2, "max_completion_tokens": 8, "prompts_per_step": 4, **settings}
    module = GRPOModule(student, Scripted(), EveryThird(kinds), GRPOSettings(**given))
    data, notes = ReasoningDataModule(POOL), Notes()
    load(data, student)
    data.enter(ProblemsToSolve(PLACE, module.settings))
    harvest = HarvestAllZeroGroups(data.ledger, PLACE)
    own = [SeedSteps("x"), RecordRollouts(data.ledger, PLACE), harvest, notes, *callbacks]
    trainer = L.Trainer(max_epochs=epochs, callbacks=own, reload_dataloaders_every_n_epochs=1, **QUIET)
    trainer.fit(module, datamodule=data)
    return notes, data, module, trainer


def drawn(notes: Notes) -> list[list[str]]:
    return [[group.problem.id for group in groups] for groups in notes.steps]


def test_by_default_the_steps_are_cut_beforehand() -> None:
    notes, data, module, _ = fitted({})
    shuffled = list(data.problems)
    data.rng("shuffle", 1, "grpo", 0).shuffle(shuffled)
    assert [name for step in drawn(notes) for name in step] == [problem.id for problem in shuffled]
    assert module.draws is None
    assert not {name for name in notes.logged[-1] if "sampled_groups" in name or "refilled" in name}


def test_refills_that_are_never_needed_leave_the_steps_as_they_are() -> None:
    plain, _, one, _ = fitted({}, kinds=1)
    ready, _, other, _ = fitted({"max_sampled_groups": 12}, kinds=1)
    assert drawn(ready) == drawn(plain)
    for ours, theirs in zip(other.student.parameters(), one.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_file_order_is_the_pool_s() -> None:
    notes, data, _, _ = fitted({"order": "file"})
    assert [name for step in drawn(notes) for name in step] == [problem.id for problem in data.problems]


def test_silent_groups_are_replaced_until_there_are_enough_or_the_cap_is_reached() -> None:
    notes, _, _, trainer = fitted({"max_sampled_groups": 8})
    for groups, logged in zip(notes.steps, notes.logged, strict=True):
        assert len(groups) <= 8
        assert logged["grpo/sampled_groups_step"] == len(groups)
        assert logged["grpo/refilled_step"] == max(0, len(groups) - 4)
    whole = [sum(group.informative for group in groups) >= 4 or len(groups) == 8 for groups in notes.steps]
    assert all(whole[:-1])  # the last has what the set had left
    assert max(map(len, notes.steps)) > 4
    assert trainer.global_step == sum(any(group.informative for group in groups) for groups in notes.steps)


def test_an_epoch_of_refills_ends_when_each_problem_was_drawn_once() -> None:
    notes, data, _, _ = fitted({"max_sampled_groups": 8}, epochs=2)
    steps = drawn(notes)
    assert 2 <= len(steps) < 12  # of two epochs with six planned steps each
    counts = Counter(name for step in steps for name in step)
    mastered = {group.problem.id for groups in notes.steps for group in groups if group.all_one}
    assert counts == {problem.id: 1 if problem.id in mastered else 2 for problem in data.problems}


def test_silent_groups_are_evidence_and_those_without_success_are_harvested() -> None:
    notes, data, module, _ = fitted({"max_sampled_groups": 8})
    groups = [group for step in notes.steps for group in step]
    assert all(group.problem.id in data.ledger for group in groups)
    failed = {group.problem.id for group in groups if group.all_zero}
    assert failed
    assert {group.problem.id for group in data.ledger.harvested(1)} == failed
    assert module.student.tokens.sampled == sum(group.num_tokens for group in groups)


def test_a_budget_ends_the_fit_at_the_step_with_its_refills() -> None:
    class Budget(Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.callbacks.append(TokenBudget(pl_module.student.tokens, 1))  # type: ignore[attr-defined]

    notes, _, _, _ = fitted({"max_sampled_groups": 8}, Budget())
    assert len(notes.steps) == 1
    assert len(notes.steps[0]) > 4


def test_a_cooldown_brings_problems_back_within_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "slmreason")
    notes, _, _, _ = fitted({"order": "informative", "cooldown": 1})
    steps = drawn(notes)
    assert len(steps) == 6
    counts = Counter(name for step in steps for name in step)
    most = max(counts.values())
    assert most > 1
    said = f"grpo.cooldown 1: {counts.total()} groups of {len(counts)} problems, the same one up to {most} times"
    assert said in caplog.messages
    for before, after in zip(steps, steps[1:], strict=False):
        assert not set(before) & set(after)


@pytest.mark.parametrize("settings", [{"max_sampled_groups": 6}, {"max_sampled_groups": 6, "order": "informative"}])
def test_a_refill_that_was_sampled_names_no_problem_twice_in_a_step(settings: dict[str, Any]) -> None:
    notes, _, module, _ = fitted(settings)
    assert all(len(set(step)) == len(step) for step in drawn(notes))
    assert module.draws is not None
