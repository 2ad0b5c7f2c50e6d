"""How far a fit is: rows and rollouts, epochs from 1, and what refills and an earlier process make of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest

from slmreason.callbacks import StageProgressBar, StageWatch
from slmreason.data.order import Draws, Informative
from slmreason.modules import GRPOModule, GRPOSettings, SFTModule
from slmreason.rollout.transformers import HFEngine
from slmreason.run.progress import Watch
from slmreason.run.whole import WholeRun
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward


def trainer_at(epoch: int, batches: int = 5, epochs: int = 2) -> L.Trainer:
    return cast(Any, SimpleNamespace(current_epoch=epoch, num_training_batches=batches, max_epochs=epochs))


def grpo(student: Student, **settings: Any) -> GRPOModule:
    options = {"group_size": 4, "max_completion_tokens": 50, **settings}
    return GRPOModule(student, HFEngine(), AnswerReward(), GRPOSettings(**options))


def watch_of(stage: StageWatch) -> Watch:
    assert stage.watch is not None
    return stage.watch


@pytest.fixture
def whole() -> WholeRun:
    run = WholeRun(stages=("base", "sft"))
    run.enter(1)
    return run


def test_sft_counts_rows_over_all_epochs(student: Student, whole: WholeRun) -> None:
    module, stage = SFTModule(student), StageWatch("round 1 sft", whole, rows=20)
    stage.on_train_batch_start(trainer_at(0), module, None, 0)
    student.tokens.trained += 300
    stage.on_train_batch_end(trainer_at(0), module, None, None, 0)
    watch = watch_of(stage)
    assert (watch.total, watch.completions, watch.tokens) == (40, 4, 300)
    assert watch.share == pytest.approx(0.1)
    assert watch.notes == ["step 1 of 10", "epoch 1 of 2"]
    assert watch.line().startswith("round 1 sft: 4 of 40 rows (10 %), step 1 of 10, epoch 1 of 2, ")
    stage.on_train_batch_start(trainer_at(1), module, None, 0)
    stage.on_train_batch_end(trainer_at(1), module, None, None, 0)
    assert watch.completions == 24
    assert watch.notes == ["step 6 of 10", "epoch 2 of 2"]
    assert whole._under_way == [("fit", watch)]
    stage.close(module)
    assert whole._under_way == []
    assert stage.watch is None


def test_what_an_earlier_process_trained_on_says_nothing_of_the_speed(student: Student) -> None:
    module, stage = SFTModule(student), StageWatch("round 1 sft", rows=20)
    stage.on_train_batch_start(trainer_at(1), module, None, 2)  # of an epoch that goes on, Lightning says no start
    watch = watch_of(stage)
    assert (watch.known, watch.completions) == (28, 0)
    stage.on_train_batch_end(trainer_at(1), module, None, None, 2)
    assert (watch.known, watch.completions) == (28, 4)


def test_grpo_counts_rollouts_and_is_told_of_them_within_a_step(student: Student) -> None:
    module, stage = grpo(student), StageWatch("round 1 grpo", rows=10)
    stage.on_train_batch_start(trainer_at(0), module, None, 0)
    assert module.rollout_watch is stage.watch is not None
    module.rollout_watch.advance(0, 100)
    assert watch_of(stage).share == pytest.approx(100 / 50 / 80)
    module.rollout_watch.advance(8, 0)
    stage.on_train_batch_end(trainer_at(0), module, None, None, 0)
    assert watch_of(stage).line().startswith("round 1 grpo: 8 of 80 rollouts (10 %), step 1 of 10, epoch 1 of 2, ")
    stage.close(module)
    assert module.rollout_watch is None


@pytest.mark.parametrize(("cooldown", "total"), [(None, 80), (1, 160)])
def test_refills_make_an_epoch_longer_only_where_problems_come_back(
    student: Student, cooldown: int | None, total: int
) -> None:
    module = grpo(student, prompts_per_step=2, order="informative", max_sampled_groups=6, cooldown=cooldown)
    module.draws = Draws(Informative(4), cooldown)
    stage = StageWatch("round 1 grpo", rows=10)
    stage.on_train_batch_start(trainer_at(0), module, None, 0)
    assert module.rollout_watch is not None
    module.rollout_watch.advance(16, 400)  # two groups, and two in place of silent ones
    stage.on_train_batch_end(trainer_at(0), module, None, None, 0)
    assert watch_of(stage).total == total


def test_a_bar_says_what_the_module_logs_for_it(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    module, stage = SFTModule(student), StageWatch("round 1 sft", rows=20)
    logged = {"sft/loss_step": 0.123456, "sft/loss_epoch": 0.5, "grpo/reward": 1.0}
    trainer: Any = trainer_at(0)
    trainer.progress_bar_metrics, trainer.loggers = logged, []
    bar = StageProgressBar(stage)
    bar.on_train_batch_end(trainer, module, None, None, 0)
    assert stage.metrics == []  # there is no terminal
    monkeypatch.setattr("slmreason.callbacks.progress.are_shown", lambda: True)
    bar.on_train_batch_end(trainer, module, None, None, 0)
    assert stage.metrics == ["loss 0.123", "reward 1"]
    stage.on_train_batch_start(trainer, module, None, 0)
    assert watch_of(stage).notes == ["step 0 of 10", "epoch 1 of 2", "loss 0.123", "reward 1"]
    bar.disable()
    stage.metrics = []
    bar.on_train_batch_end(trainer, module, None, None, 0)
    assert stage.metrics == []
