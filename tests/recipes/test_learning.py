"""The student really learns: small and seeded, and each fails when the objective's sign, mask or scale is broken."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from slmreason.callbacks import RecordRollouts
from slmreason.data.batches import PackedDataset
from slmreason.data.ledger import Ledger
from slmreason.embedded.families import make_problems, rebuild, write_solution
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.settings import CFTSettings, GRPOSettings, SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.records import Example, Place, Problem, RolloutGroup
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.student.packing import collate, plan_batches
from slmreason.supervision.critique import Critic, CritiqueSettings, critique_examples
from slmreason.teacher.procedural import ProceduralTeacher
from slmreason.verify.rewards import AnswerReward
from tests.modules.test_modules import QUIET, Prompts

pytestmark = pytest.mark.slow


def loader_of(examples: list[Example], student: Student, batch_size: int) -> Any:
    plan = plan_batches([len(e) for e in examples], 10**6, batch_size)
    return DataLoader(PackedDataset(examples, plan, 1, student.pad_token_id), batch_size=None)  # type: ignore[arg-type]


def accuracy(student: Student, problems: list[Problem], samples: int = 1, temperature: float = 0.0) -> float:
    groups = collect(student, HFEngine(), AnswerReward(), problems, samples, Sampling(80, temperature, seed=9))
    return sum(group.num_correct for group in groups) / (len(groups) * samples)


def test_sft_drives_32_examples_to_full_greedy_accuracy(student: Student) -> None:
    problems = make_problems("chain", "train", 32, (3, 4, 5, 6))
    examples = []
    for problem in problems:
        text = write_solution([step.text for step in rebuild(problem.id).steps], problem.answer)
        examples.append(
            Example(student.encode_question(problem.question), student.encode_target(text), problem.id, "teacher")
        )
    assert accuracy(student, problems) < 0.8
    module = SFTModule(student, SFTSettings(learning_rate=1e-3, epochs=40, warmup_steps=5))
    L.Trainer(max_epochs=40, gradient_clip_val=1.0, **QUIET).fit(module, loader_of(examples, student, 32))
    assert accuracy(student, problems) == 1.0


def test_grpo_lifts_the_mean_reward_of_medium_problems_from_its_own_samples() -> None:
    student = Student("embedded:qwen2", instruction="")
    pool = make_problems("chain", "train", 160, (2, 3, 4))
    groups = collect(student, HFEngine(), AnswerReward(), pool, 8, Sampling(80, seed=1))
    medium = [g.problem for g in groups if 0.25 <= g.num_correct / 8 < 0.75][:32]
    assert len(medium) == 32
    before = accuracy(student, medium, 16, 1.0)
    settings = GRPOSettings(learning_rate=1e-4, max_completion_tokens=80)
    module = GRPOModule(student, HFEngine(), AnswerReward(), settings)
    recorder = RecordRollouts(Ledger(None), Place(1, "grpo"))
    batches = [medium[:16], medium[16:]] * 5
    L.Trainer(max_epochs=1, callbacks=[recorder], gradient_clip_val=None, **QUIET).fit(module, Prompts(batches))
    after = accuracy(student, medium, 16, 1.0)
    assert after > before + 0.08, (before, after)


@pytest.mark.long
def test_cft_lowers_the_loss_on_held_out_critiques(student: Student) -> None:
    teacher, reward, settings = ProceduralTeacher(), AnswerReward(), CritiqueSettings()
    pool = make_problems("chain", "train", 120, (4, 5, 6))
    groups = collect(student, HFEngine(), reward, pool, 4, Sampling(80, seed=2))
    failed: list[RolloutGroup] = [group for group in groups if group.all_zero]
    records = Critic(teacher, student, reward, settings).make(failed)
    examples = [e for record in records for e in critique_examples(record, student, settings.kinds)]
    ids = sorted({e.problem_id for e in examples})
    held_out_ids = set(ids[::4])
    train = [e for e in examples if e.problem_id not in held_out_ids]
    held_out = [e for e in examples if e.problem_id in held_out_ids]
    assert {e.origin for e in held_out} == {"diagnosis", "repair", "new_trace"}

    @torch.no_grad()
    def loss(kind: str) -> float:
        batch = collate([e for e in held_out if e.origin == kind], student.pad_token_id)
        return -student.score(batch).log_probs.mean().item()

    before = {kind: loss(kind) for kind in settings.kinds}
    module = CFTModule(student, CFTSettings(learning_rate=3e-4, epochs=3, warmup_steps=3))
    L.Trainer(max_epochs=3, gradient_clip_val=1.0, **QUIET).fit(module, loader_of(train, student, 16))
    after = {kind: loss(kind) for kind in settings.kinds}
    assert after["diagnosis"] < 0.5 * before["diagnosis"], (before, after)
    assert after["repair"] < before["repair"], (before, after)
    assert sum(after.values()) < 0.6 * sum(before.values()), (before, after)
