"""Fits that are validated on what is held out: what they log, who may watch it, and that it changes nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from slmreason.cli import main
from tests.runs import Run, command

FIT = [
    "fit", "--config=quickstart", "--data.train=embedded:chain/train?count=24", "--data.token_budget=1000",
    "--data.batch_size=4", "--data.routing=all", "--benchmarks=[]", "--curriculum.rounds=1",
    "--curriculum.probe.attempts=2", "--curriculum.probe.epoch_share=0", "--sft.epochs=2", "--sft.learning_rate=1e-3",
    "--grpo.group_size=4", "--grpo.prompts_per_step=8", "--grpo.max_completion_tokens=60", "--grpo.learning_rate=1e-4",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip
HELD_OUT = ["--data.holdout=0.25"]
Fit = Callable[..., Run]


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    monkeypatch.chdir(tmp_path)

    def fitted(*args: str, name: str = "run", status: int = 0) -> Run:
        assert main([*FIT, f"--run_dir={name}", *args]) == status
        return Run(Path(name), "")

    return fitted


def logged(run: Run, stage: str, name: str) -> list[tuple[str, float]]:
    """(step, value) of a metric in a stage."""
    with open(run.folder / "round-01" / stage / "metrics.csv") as file:
        return [(row["step"], float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def values(run: Run, stage: str, name: str) -> list[float]:
    return [value for _, value in logged(run, stage, name)]


def with_callback(class_path: str, arguments: dict[str, Any]) -> str:
    entry = {"class_path": class_path, "init_args": arguments}
    Path("callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    return "--config=callbacks.yaml"


def assert_trained_alike(ours: Run, theirs: Run) -> None:
    for name, tensor in ours.weights.items():
        assert torch.equal(tensor, theirs.weights[name]), name
    assert ours.rows("ledger.jsonl") == theirs.rows("ledger.jsonl")
    tokens = [
        [row["tokens"] for row in json.loads((run.folder / "summary.json").read_text())] for run in (ours, theirs)
    ]
    assert tokens[0] == tokens[1]


def test_every_stage_is_validated_once_an_epoch_and_trains_as_without(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(*HELD_OUT, "--trainer.check_val_every_n_epoch=1", "--validation.samples=3")
    said = " ".join(capsys.readouterr().out.split())
    assert "sft, epoch 1, step" in said
    for stage, epochs in (("sft", 2), ("grpo", 1), ("cft", 1)):
        shares = values(run, stage, "val/pass@1")
        assert len(shares) == len(values(run, stage, "val/pass@3")) == epochs
        assert all(0 <= share <= 1 for share in shares)
        assert all(tokens > 0 for tokens in values(run, stage, "val/tokens"))
    plain = fit(*HELD_OUT, "--trainer.limit_val_batches=0", name="plain")
    assert values(plain, "sft", "val/pass@1") == []
    assert_trained_alike(run, plain)


def test_validation_within_an_epoch_changes_no_step_of_it(fit: Fit) -> None:
    often = ["--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=null",
             "--trainer.limit_val_batches=1", "--validation.problems_per_batch=2",
             "--trainer.num_sanity_val_steps=1", "--curriculum.stages=[sft,grpo]",
             "--trainer.accumulate_grad_batches=2"]  # fmt: skip
    run = fit(*HELD_OUT, *often)
    plain = fit(*HELD_OUT, "--trainer.limit_val_batches=0", *often[-2:], name="plain")
    steps = len(values(plain, "sft", "sft/loss_step"))
    assert len(values(run, "sft", "val/pass@1")) == 2 * steps > 2  # after each batch, and a step has two
    assert {value * 2 for value in values(run, "sft", "val/pass@1")} <= {0.0, 1.0, 2.0}  # of one batch of two problems
    assert logged(run, "sft", "sft/loss_step") == logged(plain, "sft", "sft/loss_step")
    assert_trained_alike(run, plain)


def test_early_stopping_and_model_checkpoint_watch_it(fit: Fit) -> None:
    stop = {"monitor": "val/pass@1", "mode": "max", "patience": 1, "min_delta": 2.0}  # nothing is ever better
    run = fit(with_callback("lightning.pytorch.callbacks.EarlyStopping", stop), *HELD_OUT, "--sft.epochs=5",
              "--curriculum.stages=[sft]")  # fmt: skip
    assert len(values(run, "sft", "val/pass@1")) == 2
    best = {"monitor": "val/pass@1", "mode": "max", "filename": "best"}
    kept = fit(with_callback("lightning.pytorch.callbacks.ModelCheckpoint", best), *HELD_OUT,
               "--curriculum.stages=[sft]", name="kept")  # fmt: skip
    assert list(kept.folder.glob("round-01/sft/**/best.ckpt"))


def test_an_epoch_without_a_validation_ends_no_run(fit: Fit) -> None:
    stop = {"monitor": "val/pass@1", "mode": "max", "check_on_train_epoch_end": True}
    run = fit(with_callback("lightning.pytorch.callbacks.EarlyStopping", stop), *HELD_OUT,
              "--trainer.check_val_every_n_epoch=2", "--curriculum.stages=[sft]")  # fmt: skip
    assert len(values(run, "sft", "val/pass@1")) == 1


def test_a_data_set_of_its_own_is_validated_on_and_never_trained_on(fit: Fit) -> None:
    """The first five problems of the pool are those of the other data set."""
    run = fit("--data.validation=embedded:chain/train?count=5", "--curriculum.stages=[sft]", "--sft.epochs=1")
    assert len(values(run, "sft", "val/pass@1")) == 1
    rejected = {row["id"] for row in run.rows("rejects.jsonl") if "data.validation" in row["reason"]}
    assert len(rejected) == 5
    assert not rejected & {row["problem_id"] for row in run.rows("ledger.jsonl")}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--data.holdout=0.2", "--data.validation=embedded:chain/test?count=3"], "on this or on data.holdout"),
        (["--data.holdout=0.2", "--validation.samples=0"], "validation: samples and problems_per_batch must be"),
        (["--data.holdout=0.2", "--trainer.val_check_interval=00:00:10:00"], "by the clock neither several processes"),
        (["--data.holdout=0.2", "--trainer.val_check_interval=5"], "an epoch may have fewer batches"),
        (["--data.holdout=0.2", "--trainer.val_check_interval=0.0"], "trainer.val_check_interval: 0.0 is refused"),
        (["--data.holdout=0.2", "--trainer.check_val_every_n_epoch=0"], "it must be at least 1, or null"),
        (
            ["--data.holdout=0.2", "--trainer.check_val_every_n_epoch=3"],
            "no fit has so many epochs (2 of sft, 1 of",
        ),
        (["--trainer.limit_val_batches=2"], "set data.holdout or data.validation"),
    ],
)
def test_what_cannot_be_validated_is_refused_in_a_line(
    fit: Fit, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    fit(*args, status=2)
    assert says in capsys.readouterr().err


def test_what_is_held_out_may_have_flags_of_validation_where_no_stage_is_fitted(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(*HELD_OUT, "--curriculum.stages=[]", "--trainer.limit_val_batches=2", "--trainer.check_val_every_n_epoch=2")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("curriculum.stages is empty: no fit, so that what is held out is not validated on") == 1
    fit("--curriculum.stages=[]", "--trainer.limit_val_batches=2", name="nothing", status=2)
    assert "set data.holdout or data.validation" in capsys.readouterr().err


def test_a_stage_with_too_few_epochs_for_a_validation_is_named(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(*HELD_OUT, "--trainer.check_val_every_n_epoch=2", "--curriculum.stages=[sft,grpo]")
    said = " ".join(capsys.readouterr().out.split())
    assert "trainer.check_val_every_n_epoch is 2: too few epochs for a validation has 1 of grpo" in said
    assert len(values(run, "sft", "val/pass@1")) == 1
    assert values(run, "grpo", "val/pass@1") == []


@pytest.mark.parametrize(
    ("args", "monitor", "says"),
    [
        ([], "val/pass@1", "watches val/pass@1, which no stage logs: trainer.limit_val_batches is 0, or there is"),
        ([*HELD_OUT, "--trainer.limit_val_batches=0"], "val/pass@1", "trainer.limit_val_batches is 0, or there is"),
        (HELD_OUT, "val/loss", "watches val/loss, which no validation logs; there are val/pass@1, val/tokens"),
    ],
)
def test_a_metric_that_no_validation_logs_cannot_be_watched(
    fit: Fit, capsys: pytest.CaptureFixture[str], args: list[str], monitor: str, says: str
) -> None:
    fit(with_callback("lightning.pytorch.callbacks.EarlyStopping", {"monitor": monitor}), *args, status=2)
    assert says in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_is_cut_off_where_it_was_validated_goes_on_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*FIT, *HELD_OUT, "--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=null",
            "--curriculum.stages=[sft,grpo]", "--curriculum.checkpoint.every_n_steps=1",
            "--trainer.callbacks+=tests.plugins.Dies"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(*args, f"--run_dir={whole}").returncode == 0
    for stage, batch in (("sft", 2), ("grpo", 1)):
        monkeypatch.setenv("DIES_IN", stage)
        monkeypatch.setenv("DIES_AT", str(batch))
        assert command(*args, f"--run_dir={cut}", "--resume=auto").returncode != 0
    monkeypatch.delenv("DIES_IN")
    done = command(*args, f"--run_dir={cut}", "--resume=auto")
    assert done.returncode == 0, done.stdout[-2000:]
    assert_trained_alike(Run(cut, ""), Run(whole, ""))
    for stage in ("sft", "grpo"):
        for name in ("val/pass@1", "val/tokens", f"{stage}/gradient_norm"):
            assert logged(Run(cut, ""), stage, name) == logged(Run(whole, ""), stage, name)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_validate_to_the_numbers_of_one(tmp_path: Path, strategy: str) -> None:
    runs = []
    for devices in (1, 2):
        folder = tmp_path / f"run-{devices}"
        accumulate = 2 // devices
        done = command(*FIT, *HELD_OUT, f"--run_dir={folder}", f"--trainer.devices={devices}",
                       "--curriculum.stages=[sft,grpo]", "--validation.samples=2", "--validation.problems_per_batch=3",
                       f"--trainer.accumulate_grad_batches={accumulate}", f"--grpo.prompts_per_step={4 * devices}",
                       *([f"--trainer.strategy={strategy}"] if devices == 2 else []))  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        runs.append(Run(folder, done.stdout))
    one, two = runs
    for stage in ("sft", "grpo"):
        for name in ("val/pass@1", "val/pass@2", "val/tokens"):
            assert values(two, stage, name) == values(one, stage, name) != []
    assert two.output.count("held-out problems right") == one.output.count("held-out problems right")
