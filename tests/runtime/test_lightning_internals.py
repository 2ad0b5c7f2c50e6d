"""The private names of Lightning: the installed one has them all, and only one file of ours knows them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.strategies.launchers import subprocess_script as observers
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, launchers

import slmreason
from slmreason.runtime import lightning_internals
from slmreason.runtime.lightning_internals import (
    attached_trainer,
    group_timeout,
    logged_metrics,
    logging_step,
    rename,
    set_csv_writer,
    set_logging_step,
    set_version,
    started_processes,
    starts_by_script,
    tensor_parallel_size,
    tensorboard_options,
    waits_for_validation,
    wandb_options,
)

HOME = "slmreason.runtime.lightning_internals"


# -- the installed Lightning has them -------------------------------------------------------------------------------


class Tiny(L.LightningModule):
    """Logs one mean a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, list[str], float]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("mean", batch.sum(), on_step=True, on_epoch=True, batch_size=2)
        return (self.weight * batch).sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = logged_metrics(self.trainer)
        self.seen.append((logging_step(self.trainer), sorted(metrics), metrics["training_step.mean"].value.item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)  # fmt: skip


OBJECTS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "LightningModule": (lambda folder: Tiny(), ("_trainer",)),
    "the training epoch loop": (
        lambda folder: quiet_trainer().fit_loop.epoch_loop, ("_results", "_batches_that_stepped"),
    ),
    "EarlyStopping": (lambda folder: EarlyStopping("loss"), ("_check_on_train_epoch_end",)),
    "CSVLogger": (lambda folder: CSVLogger(folder), ("_name", "_version", "_experiment", "_fs")),
    "TensorBoardLogger": (lambda folder: TensorBoardLogger(folder), ("_name", "_version", "_kwargs")),
    # MLflow need not be installed: the names that its constructor sets.
    "MLFlowLogger": (
        lambda folder: SimpleNamespace(**dict.fromkeys(MLFlowLogger.__init__.__code__.co_names)),
        ("_run_id", "_run_name"),
    ),
    "WandbLogger": (lambda folder: WandbLogger(save_dir=folder, offline=True), ("_wandb_init",)),
    "the CSV logger's writer": (
        lambda folder: ExperimentWriter(str(folder / "new")), ("_check_log_dir_exists", "_rewrite_with_new_header"),
    ),
    "DDPStrategy": (lambda folder: DDPStrategy(), ("_timeout",)),
    "ModelParallelStrategy": (lambda folder: ModelParallelStrategy(), ("_timeout", "_tensor_parallel_size")),
    "strategies.launchers": (lambda folder: launchers, ("_SubprocessScriptLauncher",)),
    "Fabric's subprocess_script": (lambda folder: observers, ("_ChildProcessObserver",)),
    "Lightning's subprocess_script": (lambda folder: launchers.subprocess_script, ("_launch_process_observer",)),
    "the launcher's observer": (lambda folder: observers._ChildProcessObserver, ("_terminate_all",)),
}  # fmt: skip
"""Objects of Lightning with the private names that we use of them."""
KNOWN = {name for _, names in OBJECTS.values() for name in names}


@pytest.mark.parametrize("what", OBJECTS)
def test_the_installed_lightning_has_the_names(what: str, tmp_path: Path) -> None:
    make, names = OBJECTS[what]
    made = make(tmp_path)
    gone = [name for name in names if not hasattr(made, name)]
    assert not gone, f"Lightning {L.__version__}: {what} has no {', '.join(gone)}; see {lightning_internals.__file__}"


def test_the_names_tried_here_are_all_that_the_file_uses() -> None:
    tree = ast.parse(inspect.getsource(lightning_internals))
    assert {name for _, name in private_names(tree)} == KNOWN


def test_the_loggers_step_can_be_put_right() -> None:
    trainer = quiet_trainer()
    set_logging_step(trainer, 7)
    assert logging_step(trainer) == 7


def test_what_is_logged_is_a_mean_that_goes_on_at_the_loggers_step() -> None:
    module = Tiny()
    assert attached_trainer(module) is None
    trainer = quiet_trainer()
    trainer.fit(module, torch.utils.data.DataLoader(torch.tensor([1.0, 3.0]), batch_size=1))
    assert attached_trainer(module) is trainer
    assert module.seen == [(0, ["training_step.mean"], 2.0), (1, ["training_step.mean"], 8.0)]  # value times batch size
    metric = logged_metrics(trainer)["training_step.mean"]
    meta = metric.meta
    assert (meta.fx, meta.on_epoch, meta.is_mean_reduction, meta.is_sum_reduction) == (
        "training_step", True, True, False,
    )  # fmt: skip


@pytest.mark.parametrize(("told", "waits"), [(None, False), (True, False), (False, True)])
def test_early_stopping_says_when_it_looks(told: bool | None, waits: bool) -> None:
    assert waits_for_validation(EarlyStopping("loss", check_on_train_epoch_end=told)) is waits


def test_loggers_get_another_name(tmp_path: Path) -> None:
    for logger in (CSVLogger(tmp_path, name="before"), TensorBoardLogger(tmp_path, name="before")):
        rename(logger, "after")
        assert logger.name == "after"
    assert wandb_options(WandbLogger(name="mine", save_dir=tmp_path, offline=True))["name"] == "mine"


def test_loggers_go_on_with_another_version(tmp_path: Path) -> None:
    for logger in (CSVLogger(tmp_path), TensorBoardLogger(tmp_path)):
        set_version(logger, 3)
        assert logger.version == 3
        assert logger.log_dir.endswith("version_3")
    assert tensorboard_options(TensorBoardLogger(tmp_path, max_queue=1)) == {"max_queue": 1}
    writer, csv_logger = ExperimentWriter(str(tmp_path / "mine")), CSVLogger(tmp_path)
    set_csv_writer(csv_logger, writer)
    assert csv_logger.experiment is writer


def test_strategies_say_what_they_were_given() -> None:
    minute = timedelta(minutes=1)
    assert group_timeout(DDPStrategy(timeout=minute)) == minute
    assert group_timeout(ModelParallelStrategy(timeout=minute)) == minute
    assert tensor_parallel_size(ModelParallelStrategy(tensor_parallel_size=2)) == 2
    assert tensor_parallel_size(ModelParallelStrategy()) == "auto"


@pytest.mark.parametrize(("strategy", "by_script"), [("ddp", True), ("ddp_spawn", False)])
def test_launchers_are_told_apart(strategy: str, by_script: bool) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    assert starts_by_script(trainer.strategy.launcher) is by_script
    assert started_processes(trainer.strategy.launcher) == []


# -- and no other file of the package knows them --------------------------------------------------------------------


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every private name that is imported, read or set as an attribute, or defined as a method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if private(alias.name))
        elif isinstance(node, ast.ClassDef):
            yield from ((item.lineno, item.name) for item in node.body
                        if isinstance(item, ast.FunctionDef) and private(item.name))  # fmt: skip


@cache
def names_of_lightning(cls: type) -> frozenset[str]:
    """The private names in the source of a class of Lightning."""
    return frozenset(name for _, name in private_names(ast.parse(textwrap.dedent(inspect.getsource(cls)))))


def modules() -> list[Any]:
    found = [module.name for module in walk_packages(slmreason.__path__, "slmreason.")]
    return [import_module(name) for name in found if name != HOME and not name.endswith("__main__")]


def source_of(module: Any) -> str:
    return Path(module.__file__).read_text(encoding="utf-8")


def imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_other_file_imports_a_private_name_of_lightning() -> None:
    found = {
        module.__name__: [
            name
            for name in imports_of(ast.parse(source_of(module)))
            if name.partition(".")[0] in ("lightning", "lightning_fabric", "pytorch_lightning")
            and any(map(private, name.split(".")))
        ]
        for module in modules()
    }
    assert len(found) > 80
    assert {name: imports for name, imports in found.items() if imports} == {}


def test_no_other_file_reads_a_private_attribute_of_an_object_of_lightning() -> None:
    """No private name that the one file knows, and none at all of what is named as Lightning's objects are."""
    named_so = {"trainer", "module", "pl_module", "loop", "fit_loop", "epoch_loop", "logger", "callback", "strategy",
                "launcher", "wanted", "optimizer", "datamodule"}  # fmt: skip
    found = []
    for module in modules():
        for node in ast.walk(ast.parse(source_of(module))):
            if not isinstance(node, ast.Attribute) or not private(node.attr):
                continue
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls") and (node.attr in KNOWN or owner.rpartition(".")[2] in named_so):
                found.append(f"{module.__name__}:{node.lineno} {owner}.{node.attr}")
    assert [line for line in found if "_step_supports_amp_scaling" not in line] == []  # PyTorch's, of an optimizer


def test_no_other_class_below_one_of_lightning_uses_its_private_names() -> None:
    found = []
    for module in modules():
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != module.__name__:
                continue
            theirs = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "lightning"]
            taken = frozenset[str]().union(*map(names_of_lightning, theirs))
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
            used = {attr for _, attr in private_names(tree)}
            found += [f"{module.__name__}.{name}: {attr}" for attr in sorted(used & taken)]
    assert found == []
