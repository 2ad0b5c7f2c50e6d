"""The loggers of a run: what they stay, and what they do otherwise than their classes."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slmreason.run.loggers import Axis, RunLogger, begin, end, go_on, name_after, of_run, step_of, tell_config


class Kept(Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[dict[str, float], int | None]] = []
        self.ended: list[str] = []

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> int:
        return 5

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.told.append((dict(metrics), step))

    def log_table(self, key: str, step: int | None = None) -> None:
        self.log_metrics({key: 1.0}, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.told.append((params, None))

    def finalize(self, status: str) -> None:
        self.ended.append(status)


def kept(axis: Axis, tokens: int = 9) -> Any:
    return of_run(Kept(), axis, lambda: tokens)


def test_steps_are_those_of_the_run_and_tokens_stand_beside_every_number() -> None:
    axis = Axis(steps=10)
    logger = kept(axis)
    logger.log_metrics({"sft/loss": 1.0}, step=2)
    axis.steps = 20
    logger.log_table("grpo/samples", step=0)
    logger.log_metrics({"mine": 3.0})
    assert logger.told == [
        ({"sft/loss": 1.0, "tokens/total": 9.0}, 12),
        ({"grpo/samples": 1.0, "tokens/total": 9.0}, 20),
        ({"mine": 3.0, "tokens/total": 9.0}, 20),
    ]
    assert step_of(logger, 3) == 23
    assert step_of(Kept(), 3) == 3


def test_a_logger_stays_what_it_is_and_ends_with_the_run_alone() -> None:
    logger = kept(Axis())
    assert isinstance(logger, Kept)
    assert isinstance(logger, RunLogger)
    assert type(logger).__name__ == "Kept"
    logger.finalize("success")  # a Trainer at the end of its fit
    assert logger.ended == []
    end(logger, "failed")
    assert logger.ended == ["failed"]


def test_what_is_kept_of_the_axis_does_not_move_on() -> None:
    axis = Axis(steps=4, spent={"probe": 1})
    then = axis.copy(in_fit=3)
    axis.spent["probe"] = 2
    assert (then.step, then.spent, axis.step) == (7, {"probe": 1}, 4)


def csv_rows(path: Path) -> list[tuple[int, float]]:
    with open(path, newline="") as file:
        return [(int(row["step"]), float(row["x"])) for row in csv.DictReader(file)]


def test_a_csv_file_goes_on_where_the_run_does(tmp_path: Path) -> None:
    first, second = CSVLogger(tmp_path), CSVLogger(tmp_path)
    for logger in (first, second):
        name_after(logger, "run")
    version = begin(first)
    for step in range(4):
        first.log_metrics({"x": float(step)}, step)
    first.save()
    assert go_on(second, version, 2)
    second.log_metrics({"x": 20.0, "y": 1.0}, 2)
    second.save()
    [path] = tmp_path.glob("lightning_logs/run/version_*/metrics.csv")
    assert csv_rows(path) == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_tensorboard_hides_what_was_logged_beyond_the_place_it_goes_on_from(tmp_path: Path) -> None:
    first, second = TensorBoardLogger(tmp_path), TensorBoardLogger(tmp_path)
    for logger in (first, second):
        name_after(logger, "run")
    version = begin(first)
    tell_config(first, {"grpo": {"group_size": 8}}, "grpo:\n  group_size: 8\n", is_new=True)
    for step in range(4):
        first.log_metrics({"x": float(step)}, step)
    first.save()  # as Lightning does whenever it has logged
    assert go_on(second, version, 2)
    second.log_metrics({"x": 20.0}, 2)
    second.finalize("success")
    [folder] = (tmp_path / "lightning_logs/run").iterdir()
    held = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in held.Scalars("x")] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    assert "group_size: 8" in (folder / "hparams.yaml").read_text()


def test_a_new_run_has_a_new_experiment(tmp_path: Path) -> None:
    first, second = TensorBoardLogger(tmp_path), TensorBoardLogger(tmp_path)
    assert [begin(first), begin(second)] == [0, 1]


def test_a_kind_that_is_not_known_goes_on_by_its_own_method_or_not_at_all() -> None:
    assert not go_on(Kept(), 5, 2)
    asked: list[Any] = []
    able = Kept()
    able.resume = lambda version, step: asked.append((version, step))  # type: ignore[attr-defined]
    assert go_on(able, 5, None)
    assert asked == [(5, None)]


def test_mlflow_has_one_run_with_the_keys_of_the_config_as_parameters(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow.tracking import MlflowClient

    home = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first, second = (of_run(MLFlowLogger(tracking_uri=home), axis, lambda: 7) for axis in (Axis(), Axis(steps=2)))
    for logger in (first, second):
        name_after(logger, "quickstart")
    version = begin(first)
    tell_config(first, {"grpo": {"group_size": 8}}, "", is_new=True)
    first.log_metrics({"val/pass@1": 0.5}, 1)
    end(first, "failed")
    assert go_on(second, version, 2)
    tell_config(second, {"grpo": {"group_size": 8}, "curriculum": {"max_tokens": 5}}, "", is_new=False)
    client = MlflowClient(home)
    assert client.get_run(version).info.status == "RUNNING"
    second.log_metrics({"val/pass@1": 0.75}, 0)
    end(second, "success")
    [run] = client.search_runs([client.get_run(version).info.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (version, "quickstart", "FINISHED")
    assert run.data.params == {"grpo.group_size": "8"}
    points = [(m.step, m.value) for m in client.get_metric_history(version, "val/pass_at_1")]
    assert points == [(1, 0.5), (2, 0.75)]
    assert run.data.metrics["tokens/total"] == 7
