"""Steps whose loss or gradient is not finite: nothing changes, they are counted, and a run of them stops the run."""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from slmreason.callbacks import RecordRollouts
from slmreason.data.batches import PackedDataset
from slmreason.data.ledger import Ledger
from slmreason.embedded.families import make_problems
from slmreason.modules.base import NonFiniteError, StudentModule
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.nonfinite import load_bad_batch, repeat_bad_batch
from slmreason.modules.policy_batch import PolicyBatch
from slmreason.modules.settings import CFTSettings, GRPOSettings, SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.records import Place
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Lora, Student
from slmreason.verify.rewards import AnswerReward
from tests.modules.test_modules import QUIET, Prompts, solution_examples
from tests.runs import SMALL, TWO, command, long

State = tuple[list[Tensor], dict[str, Any]]


class Poisons(Callback):
    """Makes the loss (or the gradient alone) of some micro-batches NaN (or infinite): those of these numbers, counted
    from the start of each fit. POISONED, if set, gives the numbers, for the last process alone."""

    def __init__(self, *numbers: int, what: str = "loss", factor: float = float("nan")) -> None:
        self.numbers, self.what, self.factor = set(numbers), what, factor
        if os.environ.get("POISONED"):
            self.numbers = {int(number) for number in os.environ["POISONED"].split()}

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.seen, plain = 0, type(pl_module).loss_of.__get__(pl_module)
        if os.environ.get("POISONED") and trainer.global_rank != trainer.world_size - 1:
            self.numbers = set()

        def loss_of(batch: Any) -> Tensor:
            loss: Tensor = plain(batch)
            self.seen += 1
            if self.seen - 1 not in self.numbers:
                return loss
            if self.what == "loss":
                return loss * self.factor
            loss.register_hook(lambda gradient: gradient * self.factor)
            return loss

        pl_module.loss_of = loss_of


class Watches(Callback):
    """The weights and the optimizer's state after each optimizer step."""

    def __init__(self) -> None:
        self.states: list[State] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.states):
            weights = [parameter.detach().clone() for parameter in pl_module.student.parameters()]
            self.states.append((weights, copy.deepcopy(trainer.optimizers[0].state_dict()["state"])))


def same(ours: State, theirs: State) -> bool:
    moments = [[t for kept in state.values() for t in kept.values()] for _, state in (ours, theirs)]
    return all(
        len(mine) == len(other) and all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        for mine, other in ((ours[0], theirs[0]), (moments[0], moments[1]))
    )


def fit_sft(
    student: Student, *callbacks: Callback, batches: int = 8, accumulate: int = 2, module: SFTModule | None = None,
    leave_out: tuple[int, ...] = (), **flags: Any,
) -> tuple[SFTModule, L.Trainer]:  # fmt: skip
    examples = solution_examples(student, 4 * batches)
    plan = [[*range(4 * i, 4 * i + 4)] for i in range(batches) if i not in leave_out]
    module = module or SFTModule(student, SFTSettings(1e-3, weight_decay=0.1))
    loader = DataLoader(PackedDataset(examples, plan, accumulate, student.pad_token_id), batch_size=None)  # type: ignore[arg-type]
    trainer = L.Trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=list(callbacks), **QUIET | flags)
    trainer.fit(module, loader)
    return module, trainer


@pytest.mark.parametrize(("stage", "settings"), [(SFTModule, SFTSettings), (CFTModule, CFTSettings)])
@pytest.mark.parametrize(
    ("what", "factor", "flags"),
    [
        ("loss", float("nan"), {}),
        ("loss", float("inf"), {"gradient_clip_val": 1.0}),
        ("gradient", float("inf"), {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}),
        ("gradient", float("nan"), {"precision": "bf16-mixed"}),
        ("loss", float("nan"), {"precision": "bf16-true", "gradient_clip_val": 1.0}),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_as_if_its_batches_were_not_there(
    stage: type[SFTModule], settings: type[Any], what: str, factor: float, flags: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    student, watches = Student("embedded:qwen2", instruction=""), Watches()
    poisons = Poisons(2, what=what, factor=factor)  # the first micro-batch of the second of four steps
    module, trainer = fit_sft(
        student, poisons, watches, module=stage(student, settings(1e-3, weight_decay=0.1)), **flags
    )
    first, second, third, fourth = watches.states
    assert same(first, second)
    assert not same(second, third)
    assert not same(third, fourth)
    assert (module.skipped_steps, module.skipped_in_a_row, student.policy_version) == (1, 0, 3)
    assert trainer.callback_metrics[f"{stage.stage}/skipped_steps"] == 1
    assert f"{stage.stage}, epoch 1, step 1: skipped" in caplog.text

    without, other = Watches(), Student("embedded:qwen2", instruction="")
    fit_sft(other, without, module=stage(other, settings(1e-3, weight_decay=0.1)), leave_out=(2, 3), **flags)
    assert same(watches.states[-1], without.states[-1])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is saved goes to the trainer's folder, which is this one unless something else is said."""
    monkeypatch.chdir(tmp_path)


def test_the_overflows_by_which_a_scaler_finds_its_scale_are_no_fault(student: Student) -> None:
    scaler, watches = torch.amp.GradScaler("cpu", init_scale=2.0**20), Watches()  # type: ignore[attr-defined]
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module = SFTModule(student, SFTSettings(1e-3, max_skipped_steps=1))
    fit_sft(student, watches, module=module, accumulate=1, plugins=[plugin])
    assert module.skipped_steps == 0
    assert scaler.get_scale() < 2.0**20
    assert 0 < student.policy_version < 8
    assert same(watches.states[0], watches.states[1])
    assert not same(watches.states[0], watches.states[-1])
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteError):  # a bad loss is not the scale's fault
        fit_sft(student, Poisons(1), module=module, accumulate=1, plugins=[plugin])


def test_a_learning_rate_that_blows_up_stops_the_run_and_leaves_what_shows_it_again(
    student: Student, tmp_path: Path
) -> None:
    module = SFTModule(student, SFTSettings(learning_rate=1e30))
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .* sft\.learning_rate \(it was 1e\+30\)") as error:
        fit_sft(student, module=module, default_root_dir=str(tmp_path))
    path = tmp_path / "bad-batch-step-3.safetensors"
    assert str(path) in str(error.value)
    assert student.policy_version == 1
    bad = load_bad_batch(path)
    assert bad.about["stage"] == "sft"
    assert (bad.about["step"], bad.about["learning_rate"], bad.about["loss"]) == (3, 1e30, "nan")
    assert len(bad.batches) == 2
    assert "The answer is" in bad.about["rows"][0][0]
    loss, norm = repeat_bad_batch(path, SFTModule(Student("embedded:qwen2", instruction="")))
    assert loss != loss
    assert norm != norm
    with pytest.raises(ValueError, match="of stage sft, not cft"):
        repeat_bad_batch(path, CFTModule(student))
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_bad_batch(Path(__file__))


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)])
def test_the_saved_step_has_the_loss_to_the_digit(lora: Lora | None, tmp_path: Path) -> None:
    student = Student("embedded:qwen2", instruction="", lora=lora)
    module = SFTModule(student, SFTSettings(1e-3, max_skipped_steps=1))
    with pytest.raises(NonFiniteError):
        fit_sft(student, Poisons(6, what="gradient"), module=module, default_root_dir=str(tmp_path))
    path = tmp_path / "bad-batch-step-3.safetensors"
    loss, _ = repeat_bad_batch(path, SFTModule(Student("embedded:qwen2", instruction="", lora=lora)))
    assert f"{loss:g}" == load_bad_batch(path).about["loss"]


# -- GRPO --------------------------------------------------------------------------------------------------------


class CountedEngine(HFEngine):
    syncs = 0

    def sync(self, student: Student) -> None:
        self.syncs += 1
        super().sync(student)


def fit_grpo(student: Student, poisons: Poisons, **options: Any) -> tuple[GRPOModule, Watches, L.Trainer]:
    module = GRPOModule(student, CountedEngine(), AnswerReward(), GRPOSettings(max_completion_tokens=40, **options))
    module.gradient_clip_val, module.gradient_clip_algorithm = 1.0, "value"  # which would hide an infinite gradient
    watches, problems = Watches(), make_problems("chain", "train", 24, (1, 3, 6))
    recorder = RecordRollouts(Ledger(None), Place(1, "grpo"))
    trainer = L.Trainer(max_epochs=1, callbacks=[recorder, poisons, watches], **QUIET)
    trainer.fit(module, Prompts([problems[i : i + 8] for i in (0, 8, 16)]))
    return module, watches, trainer


def poison_policy(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[int], bool], what: str, factor: float) -> None:
    """As `Poisons`, for the policy's step, which needs its metrics too."""
    plain, seen = GRPOModule.policy_step, iter(range(100))

    def policy_step(self: GRPOModule, batch: PolicyBatch) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = plain(self, batch)
        if is_bad(next(seen)):
            if what == "loss":
                return loss * factor, metrics
            loss.register_hook(lambda gradient: gradient * factor)
        return loss, metrics

    monkeypatch.setattr(GRPOModule, "policy_step", policy_step)


@pytest.mark.parametrize(("what", "factor"), [("loss", float("nan")), ("gradient", float("inf"))])
def test_grpo_skips_the_other_updates_on_a_bad_batch_too(
    student: Student, monkeypatch: pytest.MonkeyPatch, what: str, factor: float
) -> None:
    poison_policy(monkeypatch, lambda number: number == 2, what, factor)  # two updates a batch: the second batch
    module, watches, trainer = fit_grpo(student, Poisons(), updates_per_batch=2, learning_rate=1e-4, weight_decay=0.1)
    assert trainer.global_step == 5
    first, second, third = watches.states
    assert same(first, second)
    assert not same(second, third)
    assert (module.skipped_steps, module.skipped_in_a_row, student.policy_version) == (1, 0, 2)
    assert trainer.callback_metrics["grpo/skipped_steps"] == 1
    assert module.engine.syncs == 1 + 1  # type: ignore[attr-defined]


def test_grpo_stops_and_the_saved_step_has_the_loss_to_the_digit(
    student: Student, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    poison_policy(monkeypatch, lambda number: number > 0, "gradient", float("nan"))
    options = {"learning_rate": 1e-3, "kl": 0.5, "max_skipped_steps": 2, "loss": "dapo"}
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        fit_grpo(student, Poisons(), **options)
    monkeypatch.undo()
    path = tmp_path / "bad-batch-step-2.safetensors"
    bad = load_bad_batch(path)
    assert isinstance(bad.batches[0], PolicyBatch)
    assert bad.batches[0].reference_log_probs is not None
    settings = GRPOSettings(**options)  # type: ignore[arg-type]
    again = GRPOModule(Student("embedded:qwen2", instruction=""), HFEngine(), AnswerReward(), settings)
    loss, norm = repeat_bad_batch(path, again)
    assert loss == pytest.approx(float(bad.about["loss"]), rel=1e-4, abs=1e-7)
    assert 0 < norm < float("inf")


# -- checkpoints and processes -----------------------------------------------------------------------------------


def test_the_row_of_skipped_steps_goes_on_after_a_checkpoint(student: Student) -> None:
    module: StudentModule = SFTModule(student)
    module.skipped_steps, module.skipped_in_a_row = 5, 2
    checkpoint: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    other = SFTModule(student)
    other.on_load_checkpoint(checkpoint)
    assert (other.skipped_steps, other.skipped_in_a_row) == (5, 2)
    del checkpoint["skipped_steps"]  # of a run that knew of no such thing
    other.on_load_checkpoint(checkpoint)
    assert (other.skipped_steps, other.skipped_in_a_row) == (0, 0)


POISON = "--trainer.callbacks+=tests.modules.test_nonfinite.Poisons"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", long("fsdp")])
def test_all_processes_skip_what_one_of_them_found(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POISONED", "1")
    done = command(
        "fit", *SMALL, *TWO, f"--trainer.strategy={strategy}", "--curriculum.stages=[sft]", "--benchmarks=[]",
        f"--run_dir={tmp_path / 'run'}", POISON, "--trainer.callbacks+=tests.plugins.SameEverywhere",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("skipped (loss nan") == 1  # said once
    with open(tmp_path / "run" / "round-01" / "sft" / "metrics.csv") as file:
        rows = [row["sft/skipped_steps"] for row in csv.DictReader(file) if row.get("sft/skipped_steps")]
    assert [float(value) for value in rows][:3] == [0, 1, 1]


@pytest.mark.long
@pytest.mark.slow
def test_several_processes_stop_together_with_the_batches_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POISONED", "1 2")
    done = command(
        "fit", *SMALL, *TWO, "--trainer.strategy=fsdp", "--curriculum.stages=[sft]", "--benchmarks=[]",
        "--sft.max_skipped_steps=2", f"--run_dir={tmp_path / 'run'}", POISON,
    )  # fmt: skip
    assert done.returncode != 0
    assert "2 steps in a row" in done.stdout
    path = tmp_path / "run" / "round-01" / "sft" / "bad-batch-step-2.safetensors"
    assert len(load_bad_batch(path).batches) == 2
    loss, norm = repeat_bad_batch(path, SFTModule(Student("embedded:qwen2", instruction="")))
    assert 0 < loss < 10  # it was the poison, not the batch
    assert 0 < norm < float("inf")
