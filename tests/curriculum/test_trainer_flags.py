"""Every flag of Lightning's Trainer and every callback that it has: honoured by a run of several fits, or refused."""

from __future__ import annotations

import csv
import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as lightning_callbacks
import numpy as np
import pytest
import yaml
from lightning.pytorch.callbacks import Callback

from slmreason.cli import main
from slmreason.curriculum.trainer import build_trainer
from slmreason.curriculum.trainer_flags import FLAGS, REFUSED, WITH_VALIDATION
from slmreason.curriculum.watched import METRICS
from slmreason.modules.sft import SFTModule
from slmreason.student import Student

FIT = [
    "fit", "--config=quickstart", "--teacher=TraceTeacher", "--benchmarks=[]", "--curriculum.rounds=1",
    "--curriculum.stages=[sft,grpo]", "--curriculum.probe.attempts=2", "--data.routing=all", "--data.batch_size=2",
    "--sft.epochs=2", "--grpo.epochs=2", "--grpo.group_size=2", "--grpo.prompts_per_step=2",
    "--grpo.max_completion_tokens=16", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip
ROWS = [("3 apples and 4 more are how many?", "3 + 4 = 7\n#### 7"),
        ("3 boxes of 5 hold how many?", "3 * 5 = 15\n#### 15"),
        ("9 coins without 2 are how many?", "9 - 2 = 7\n#### 7"),
        ("What is 6 plus 2?", "6 + 2 = 8\n#### 8")]  # fmt: skip
Fit = Callable[..., dict[str, int]]


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Runs two stages of two epochs, each of two batches, and gives the rows of each stage's metrics.csv."""
    monkeypatch.chdir(tmp_path)
    Path("pool.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS))

    def fitted(*args: str, status: int = 0) -> dict[str, int]:
        assert main([*FIT, "--data.train=pool.jsonl", "--run_dir=run", *args]) == status
        files = sorted(Path("run").glob("round-01/*/metrics.csv"))
        return {path.parent.name: sum(1 for _ in csv.reader(path.open())) - 1 for path in files}

    return fitted


ALL = {"grpo": 6, "sft": 6}
"""A row a batch and one an epoch."""
HONOURED: dict[str, tuple[str, dict[str, int]]] = {
    "accelerator": ("cpu", ALL),
    "strategy": ("auto", ALL),
    "devices": ("1", ALL),
    "num_nodes": ("1", ALL),
    "precision": ("bf16-true", ALL),
    "logger": ("false", {}),
    "callbacks": ("[{class_path: LearningRateMonitor}]", {"grpo": 10, "sft": 10}),
    "fast_dev_run": ("1", {}),
    "max_epochs": ("1", {"grpo": 3, "sft": 3}),
    "min_epochs": ("2", ALL),
    "max_steps": ("1", {"grpo": 2, "sft": 2}),
    "min_steps": ("3", ALL),
    "max_time": ("00:01:00:00", ALL),
    "limit_train_batches": ("0.5", {"grpo": 4, "sft": 4}),
    "log_every_n_steps": ("0", {"grpo": 2, "sft": 2}),
    "enable_checkpointing": ("false", ALL),
    "enable_progress_bar": ("false", ALL),
    "enable_model_summary": ("true", ALL),
    "accumulate_grad_batches": ("2", {"grpo": 4, "sft": 4}),
    "gradient_clip_val": ("0", ALL),
    "gradient_clip_algorithm": ("value", ALL),
    "deterministic": ("true", ALL),
    "benchmark": ("false", ALL),
    "use_distributed_sampler": ("false", ALL),
    "profiler": ("simple", ALL),
    "detect_anomaly": ("true", ALL),
    "plugins": ("[]", ALL),
    "sync_batchnorm": ("false", ALL),
    "enable_autolog_hparams": ("false", ALL),
}
"""By flag: a value, and the rows of metrics that the stages have with it."""
NOT_HONOURED: dict[str, list[str]] = {
    "max_epochs": ["0"], "max_steps": ["0", "-2"], "limit_train_batches": ["0", "0.0", "1.5"],
    "limit_val_batches": ["1", "0.5"],
    "limit_test_batches": ["1"], "limit_predict_batches": ["1"], "val_check_interval": ["1", "0.5", "00:00:10:00"],
    "check_val_every_n_epoch": ["2", "null"], "num_sanity_val_steps": ["2", "-1"], "inference_mode": ["false"],
    "overfit_batches": ["1", "0.5"], "barebones": ["true"], "accumulate_grad_batches": ["0", "-1"],
    "gradient_clip_val": ["-1", ".nan", ".inf"], "gradient_clip_algorithm": ["norms"], "max_time": ["soon", "1:2"],
    "reload_dataloaders_every_n_epochs": ["2"], "default_root_dir": ["elsewhere"], "model_registry": ["mine"],
    "profiler": ["sample"], "plugins": ["[{class_path: TorchCheckpointIO}]"], "log_every_n_steps": ["-1"],
}  # fmt: skip


def test_every_flag_of_the_trainer_is_in_one_of_the_tables() -> None:
    flags = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert flags == set(HONOURED) | set(NOT_HONOURED)
    assert set(REFUSED) | set(WITH_VALIDATION) <= set(NOT_HONOURED)


def test_every_flag_of_the_trainer_has_a_treatment() -> None:
    flags = inspect.signature(L.Trainer.__init__).parameters
    assert set(FLAGS) == set(flags) - {"self"}
    by_treatment = {kind: {flag for flag, treatment in FLAGS.items() if treatment == kind} for kind in FLAGS.values()}
    assert by_treatment["with validation"] == set(WITH_VALIDATION)
    assert by_treatment["refused"] <= set(REFUSED)
    assert not by_treatment["passed on"] & set(REFUSED)
    assert by_treatment["passed on"] | by_treatment["honoured"] == set(HONOURED)


def test_the_docs_say_of_every_flag_what_becomes_of_it() -> None:
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    said: dict[str, str] = {}
    for names, treatment in re.findall(r"^\| (`trainer\..+?) \| ([a-z ]+) \|", page, re.MULTILINE):
        for name in re.findall(r"`trainer\.(\w+)`", names):
            assert name not in said
            said[name] = treatment
    assert said == FLAGS


@pytest.mark.parametrize("flag", [flag for flag, treatment in FLAGS.items() if treatment == "passed on"])
def test_a_flag_is_passed_on_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str) -> None:
    given, value = {}, object()
    monkeypatch.setattr(L, "Trainer", lambda **config: given.update(config))
    module = SFTModule(Student("embedded:qwen2"))
    build_trainer(lambda: {flag: value}, module, tmp_path, epochs=1, callbacks=[], time_left=None)
    assert given[flag] is value


@pytest.mark.parametrize("name", ["--trainer.ckpt_path=x", "--ckpt_path=x"])
def test_what_is_no_flag_of_the_trainer_is_refused(fit: Fit, capsys: pytest.CaptureFixture[str], name: str) -> None:
    fit(name, status=2)
    assert "ckpt_path" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flag", HONOURED)
def test_a_flag_is_honoured_in_each_stage(fit: Fit, flag: str) -> None:
    value, rows = HONOURED[flag]
    assert fit(f"--trainer.{flag}={value}") == rows
    assert Path("run/student").is_dir()


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in NOT_HONOURED.items() for value in values]
)
def test_a_flag_is_refused_before_anything_is_begun(
    fit: Fit, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    fit(f"--trainer.{flag}={value}", status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert flag in error
    assert not Path("run").exists()


@pytest.mark.parametrize("value", ["0", "0.0"])
@pytest.mark.parametrize("flag", ["limit_val_batches", "num_sanity_val_steps", "overfit_batches"])
def test_a_flag_that_asks_for_nothing_is_taken(fit: Fit, flag: str, value: str) -> None:
    if flag == "num_sanity_val_steps":
        value = "0"
    fit(f"--trainer.{flag}={value}", "--curriculum.stages=[]")


def test_a_fit_may_not_outlast_the_budget_of_tokens(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.min_epochs=2", "--curriculum.max_tokens=1000", status=2)
    assert "trainer.min_epochs: 2 is refused: a fit would go on beyond curriculum.max_tokens" in capsys.readouterr().err


# -- callbacks ------------------------------------------------------------------------------------------------------

TAKEN: dict[str, dict[str, Any]] = {
    "DeviceStatsMonitor": {}, "EarlyStopping": {"monitor": "sft/loss_epoch"}, "LearningRateMonitor": {},
    "ModelCheckpoint": {}, "ModelSummary": {},
    "RichModelSummary": {}, "SpikeDetection": {}, "Callback": {}, "LambdaCallback": {}
}  # fmt: skip
NOT_TAKEN: dict[str, dict[str, Any]] = {
    "OnExceptionCheckpoint": {"dirpath": "exceptions"},
    "BackboneFinetuning": {}, "BatchSizeFinder": {}, "EMAWeightAveraging": {}, "LearningRateFinder": {},
    "GradientAccumulationScheduler": {"scheduling": {0: 1, 1: 2}}, "WeightAveraging": {},
    "ModelPruning": {"pruning_fn": "l1_unstructured"}, "StochasticWeightAveraging": {"swa_lrs": 0.01},
    "ThroughputMonitor": {"batch_size_fn": "builtins.len"},
}  # fmt: skip
UNREADABLE = {"Timer"}
"""The parser of configs cannot read it; trainer.max_time is there."""
BARS = {"RichProgressBar", "TQDMProgressBar"}
ABSTRACT = {"BaseFinetuning", "BasePredictionWriter", "Checkpoint", "ProgressBar"}


def with_callback(class_path: str, arguments: dict[str, Any]) -> str:
    entry = {"class_path": class_path, "init_args": arguments}
    Path("callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    return "--config=callbacks.yaml"


def test_every_callback_of_lightning_is_in_one_of_the_tables() -> None:
    assert set(lightning_callbacks.__all__) == {*TAKEN, *NOT_TAKEN, *UNREADABLE, *BARS, *ABSTRACT}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKEN)
def test_a_callback_is_taken_into_a_run(fit: Fit, name: str) -> None:
    rows = fit(with_callback(f"lightning.pytorch.callbacks.{name}", TAKEN[name]))
    assert set(rows) == {"sft", "grpo"}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_callback_is_refused_by_name_with_what_to_use(
    fit: Fit, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    fit(with_callback(f"lightning.pytorch.callbacks.{name}", NOT_TAKEN[name]), status=2)
    assert f"trainer.callbacks: {name} is refused: " in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("watched", ["sft/loss", "sft/loss_epoch", "grpo/reward", "grpo/loss", "grpo/entropy"])
def test_a_callback_that_watches_one_stage_works_there_and_is_left_out_elsewhere(
    fit: Fit, capsys: pytest.CaptureFixture[str], watched: str
) -> None:
    rows = fit(with_callback("EarlyStopping", {"monitor": watched, "patience": 1, "stopping_threshold": 1000.0}))
    stage = watched.partition("/")[0]
    other = {"sft": "grpo", "grpo": "sft"}[stage]
    assert rows[other] == ALL[other]
    if watched != "grpo/loss" and watched != "grpo/entropy":  # which are there when a group is informative alone
        assert rows[stage] == 3  # below the threshold after the first epoch
    assert f"EarlyStopping watches {watched}: it is in the {stage} stages alone" in " ".join(
        capsys.readouterr().out.split()
    )


WATCHES: list[tuple[str, dict[str, Any], str]] = [
    ("EarlyStopping", {"monitor": "cft/loss"}, "watches cft/loss, and there is no cft in curriculum.stages"),
    ("EarlyStopping", {"monitor": "sft/los"}, "watches sft/los, which no stage logs; there are sft/loss"),
    ("EarlyStopping", {"monitor": "val_loss"}, "watches val_loss, which no stage logs"),
    ("EarlyStopping", {"monitor": "sft/loss", "check_on_train_epoch_end": False}, "check_on_train_epoch_end"),
    ("EarlyStopping", {"monitor": "val/pass@1"}, "there is nothing to validate on"),
    ("ModelCheckpoint", {"monitor": "val_loss"}, "watches val_loss, which no stage logs"),
    ("ModelCheckpoint", {"monitor": "grpo/entropy"}, "an epoch without an informative group does not have"),
    (
        "EarlyStopping",
        {"monitor": "grpo/kl"},
        "watches grpo/kl, which no stage logs (grpo.kl is 0); there are",
    ),
    ("EarlyStopping", {"monitor": "grpo/rescue/help"}, "which no stage logs (grpo.rescue.kind is null); there are"),
    ("EarlyStopping", {"monitor": "grpo/masked"}, "which no stage logs (grpo.mask_mismatch is null); there are"),
    (
        "EarlyStopping",
        {"monitor": "grpo/refilled"},
        "which no stage logs (grpo.max_sampled_groups is null, and",
    ),
    (
        "ModelCheckpoint",
        {"monitor": "grpo/reward/brevity"},
        "no stage logs (no term of reward has that name)",
    ),
    ("ModelCheckpoint", {"dirpath": "pool.jsonl"}, "pool.jsonl is a file"),
]


@pytest.mark.parametrize(("name", "arguments", "says"), WATCHES)
def test_a_callback_that_could_not_work_in_any_stage_is_refused(
    fit: Fit, capsys: pytest.CaptureFixture[str], name: str, arguments: dict[str, Any], says: str
) -> None:
    fit(with_callback(name, arguments), status=2)
    error = capsys.readouterr().err
    assert f"trainer.callbacks: {name}" in error
    assert says in error
    assert not Path("run").exists()


def test_where_nothing_is_fitted_nothing_is_there_to_watch_and_that_is_said(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(with_callback("EarlyStopping", {"monitor": "sft/loss"}), "--curriculum.stages=[]")
    said = " ".join(capsys.readouterr().out.split())
    assert "EarlyStopping watches sft/loss, and curriculum.stages is empty: there is no fit to watch" in said


class Collects(Callback):
    """Keeps the names of the metrics of every batch and epoch."""

    seen: set[str] = set()  # noqa: RUF012 - of all fits

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.update(trainer.callback_metrics)


@pytest.mark.slow
def test_the_metrics_that_can_be_watched_are_those_that_a_stage_logs(fit: Fit) -> None:
    fit(with_callback("tests.curriculum.test_trainer_flags.Collects", {}), "--grpo.kl=0.1", "--grpo.temperature=2",
        "--grpo.mask_mismatch=token",
        "--reward=tests.plugins.CoinReward")  # fmt: skip
    fit(with_callback("tests.curriculum.test_trainer_flags.Collects", {}), "--grpo.max_sampled_groups=4",
        "--curriculum.stages=[grpo]")  # fmt: skip
    assert Collects.seen == {f"{stage}/{name}" for stage in ("sft", "grpo") for name in METRICS[stage]}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--trainer.logger=false", "--trainer.callbacks+=LearningRateMonitor"], "trainer.logger is false"),
        (["--trainer.callbacks+=TQDMProgressBar"], "the Trainer of sft cannot be made"),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.enable_checkpointing=false"], "the Trainer of sft cannot"),
        (
            ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=pool.jsonl"],
            "save_dir of CSVLogger: pool.jsonl is",
        ),
        (
            ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=/proc/x"],
            "save_dir of CSVLogger: /proc/x cannot be",
        ),
    ],
)
def test_a_trainer_that_cannot_be_made_is_known_before_anything_is_measured(
    fit: Fit, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    fit(*args, status=2)
    assert says in capsys.readouterr().err
    assert not Path("run").exists()


class KeepsAnything(Callback):
    """Its state begins well and then is what no checkpoint can hold."""

    steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"array": np.arange(3), "thing": object() if self.steps else None}


class KeepsAThing(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"thing": object()}


def test_a_state_that_cannot_be_kept_is_refused_by_name(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("--trainer.callbacks+=tests.curriculum.test_trainer_flags.KeepsAThing", status=2)
    assert "trainer.callbacks: KeepsAThing: its state cannot be kept in a checkpoint: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_state_that_cannot_be_kept_later_does_not_end_the_run(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit(
        "--trainer.callbacks+=tests.curriculum.test_trainer_flags.KeepsAnything",
        "--curriculum.checkpoint.every_n_steps=1",
    )
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("callbacks/KeepsAnything is left out, so a run that goes on begins it anew") == 1


# -- run_dir and other paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_dir", "says"),
    [
        (".", "is no name of a folder"), ("..", "is no name of a folder"), ("/", "is no name of a folder"),
        ("a/..", "is no name of a folder"), ("", "is no name of a folder"), (" ", "is no name of a folder"),
        ("a\0b", "is no name of a folder"), ("pool.jsonl", "pool.jsonl is a file"),
        ("pool.jsonl/run", "pool.jsonl is a file; a folder is needed there"),
        ("dangling", "dangling is a link to nowhere, which does not exist"),
        ("dangling/run", "dangling is a link to nowhere, which does not exist"),
        ("loop/run", "loop"), ("n" * 300, "cannot be a folder (File name too long)"),
        ("/proc/x/run", "/proc/x/run cannot be made"),
    ],
)  # fmt: skip
def test_a_run_dir_that_cannot_be_one_is_refused_in_words(
    fit: Fit, capsys: pytest.CaptureFixture[str], run_dir: str, says: str
) -> None:
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    fit("--curriculum.stages=[]", f"--run_dir={run_dir}", status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: run_dir: ")
    assert says in error
    assert not Path("pool.jsonl-2").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    Path("locked").mkdir(mode=0o500)
    fit("--run_dir=locked/run", status=2)
    assert "no permission to write to locked" in capsys.readouterr().err


def test_the_home_folder_may_be_written_as_a_tilde(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("saved.yaml").write_text(
        "run_dir: ~/runs/home\ndata: {train: ~/pool.jsonl}\nstudent: {instruction: ~/as it is}\n"
    )
    assert main([*FIT, "--config=~/saved.yaml", "--curriculum.stages=[]"]) == 0
    config = yaml.safe_load(Path("runs/home/config.yaml").read_text())
    assert config["data"]["train"] == str(Path.cwd() / "pool.jsonl")
    assert config["student"]["instruction"] == "~/as it is"
    assert not Path("~").exists()


# -- what the run did -----------------------------------------------------------------------------------------------


def test_without_benchmarks_the_run_says_in_a_sentence_what_it_did(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("--curriculum.stages=[cft]")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("no benchmark was run (benchmarks is empty); 0 of 1 stages done in ") for line in lines)
    assert "round 1 cft: skipped: no all-zero group was harvested in this round" in lines
    assert all(len(line) >= len("base: done") for line in lines)  # no column of three letters
