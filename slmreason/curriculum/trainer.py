"""One Lightning Trainer for each fit, from the user's `trainer` section plus what a stage needs."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.callbacks.timer import Timer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from slmreason.callbacks import KeepCheckpoints, StageProgressBar, StageWatch, TrainingHealth
from slmreason.curriculum.trainer_flags import (
    check_loggers,
    check_validated_epochs,
    in_stage,
    refuse_callbacks,
    refuse_flags,
)
from slmreason.curriculum.watched import Logged, validation_metrics
from slmreason.modules.base import StudentModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.validation import Validation
from slmreason.run.metrics import StageCSVLogger
from slmreason.run.tree import SafetensorsIO
from slmreason.runtime.backend import BackendSettings, applied
from slmreason.runtime.distributed import close, is_first, open_objects, world_size
from slmreason.runtime.lightning_internals import (
    group_timeout,
    patient_observer,
    started_processes,
    starts_by_script,
    tensor_parallel_size,
)
from slmreason.student import Student
from slmreason.student.weights import like

log = logging.getLogger(__name__)
T = TypeVar("T")
FreshConfig = Callable[[], dict[str, Any]]
"""Gives the keyword arguments of a Trainer with callbacks and strategy newly made; the loggers may be the same ones."""


def epochs_of(flags: Mapping[str, Any], epochs: int) -> int:
    """Of a stage that asks for so many: `trainer.max_epochs` may lower it."""
    wanted = flags.get("max_epochs")
    return epochs if wanted is None or wanted < 0 else min(epochs, wanted)


def build_trainer(
    fresh_config: FreshConfig,
    module: StudentModule,
    stage_dir: Path,
    epochs: int,
    callbacks: Sequence[Callback],
    time_left: timedelta | None,
    loggers: Sequence[Logger] | None = None,
) -> L.Trainer:
    """The Trainer of one fit.

    The user's flags stand, with four additions: max_epochs is at most `epochs`, max_time is that of the whole run
    (`KeepCheckpoints` sees to it, or Lightning's timer by `time_left` where there are no checkpoints), the dataloader
    is rebuilt at each epoch boundary, metrics.csv lies in the stage's folder, and checkpoints hold no pickle.

    Args:
        loggers: of the run, in place of those that the flags make.

    Raises:
        ValueError: trainer.plugins has another way to write checkpoints.
    """
    config = fresh_config()
    config["max_epochs"] = epochs_of(config, epochs)
    # Whoever keeps checkpoints stops the fit where it can be gone on with; Lightning's own timer does not.
    keeps_time = config.get("enable_checkpointing") is not False
    config["max_time"] = None if keeps_time else time_left
    config["default_root_dir"] = str(stage_dir)
    config["reload_dataloaders_every_n_epochs"] = 1
    config["use_distributed_sampler"] = False  # batches are planned for all ranks at once
    if config.get("logger") is not False:
        config["logger"] = [StageCSVLogger(stage_dir), *(given_loggers(config) if loggers is None else loggers)]
    config["callbacks"] = in_stage(with_callbacks(config, callbacks), module.stage)
    config["plugins"] = [*_listed(config.get("plugins")), SafetensorsIO()]
    if any(isinstance(plugin, CheckpointIO) for plugin in config["plugins"][:-1]):
        raise ValueError("trainer.plugins: checkpoints are written as safetensors; another CheckpointIO has no place")
    if config.get("enable_model_summary") is None:
        config["enable_model_summary"] = False  # the same student in every fit: say it only when asked
    if module.validation is None:
        config["limit_val_batches"] = 0
    if config.get("num_sanity_val_steps") is None:
        config["num_sanity_val_steps"] = 0  # the engine and the verifier have been at work before the fit
    if config.get("log_every_n_steps") is None:
        config["log_every_n_steps"] = 1
    if isinstance(module, GRPOModule):
        # Lightning refuses both under manual optimisation; GRPO does them itself.
        module.gradient_clip_val = config.pop("gradient_clip_val", None)
        module.gradient_clip_algorithm = config.pop("gradient_clip_algorithm", None)
        config.pop("accumulate_grad_batches", None)  # its batches are that much larger instead
    return L.Trainer(**with_strategy(config))


def try_trainers(
    fresh_config: FreshConfig,
    modules: Sequence[StudentModule],
    run_dir: Path,
    has_budget: bool,
    validation: Validation | None = None,
) -> None:
    """Makes the Trainer of each stage once, with its callbacks, so that what cannot be made is known before it is due.

    Args:
        modules: of the stages that the run has.
        has_budget: curriculum.max_tokens is set.
        validation: with what fits are validated, whether the run has any or not; None where nothing is held out.

    Raises:
        ValueError: a flag or a callback is refused, or a Trainer cannot be made; the message names the key.
    """
    config = fresh_config()
    refuse_flags(config, has_budget, has_validation=validation is not None)
    validated = validation_metrics(validation)
    if validated and not modules:
        log.info("curriculum.stages is empty: no fit, so that what is held out is not validated on")
    theirs = _listed(config.get("callbacks"))
    if config.get("limit_val_batches") == 0:
        validated = []
    if validated:
        check_validated_epochs(config, {module.stage: module.settings.epochs for module in modules})
    logged = {module.stage: Logged.of(module) for module in modules}
    refuse_callbacks(theirs, logged, config.get("logger") is not False, validated)
    check_loggers(given_loggers(config))
    for module in modules:
        keep = KeepCheckpoints(
            path=Path, state=lambda _: {}, saved=lambda: None, every_n_steps=None, every_minutes=None
        )
        ours = [StageProgressBar(StageWatch(str(module.stage))), TrainingHealth(), keep]
        try:
            # metrics.csv makes its folder at once: in the run's own, it would count as taken.
            with TemporaryDirectory() as elsewhere:
                stage_dir = Path(elsewhere) / run_dir.name / "round-01" / str(module.stage)
                build_trainer(fresh_config, module, stage_dir, module.settings.epochs, ours, None)
        except (ValueError, TypeError, RuntimeError, MisconfigurationException, OSError, ImportError) as error:
            raise ValueError(f"trainer: the Trainer of {module.stage} cannot be made: {error}") from error


def run_time(fresh_config: FreshConfig) -> timedelta | None:
    """`trainer.max_time` as a duration: the budget of the whole run.

    Raises:
        ValueError: it is no duration.
    """
    wanted = fresh_config().get("max_time")
    if wanted is None:
        return None
    try:
        return timedelta(seconds=Timer(wanted).time_remaining() or 0)
    except (MisconfigurationException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"trainer.max_time: {wanted!r} is no duration such as 00:08:30:00 (8 h 30 min)") from error


def given_loggers(config: Mapping[str, Any]) -> list[Logger]:
    """The loggers that the flags of a Trainer name, beside the `metrics.csv` of each stage.

    Args:
        config: keyword arguments of the Trainer; with `fast_dev_run` it has no loggers.
    """
    wanted = config.get("logger")
    return [] if isinstance(wanted, bool) or config.get("fast_dev_run") else _listed(wanted)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def with_callbacks(config: dict[str, Any], ours: Sequence[Callback]) -> list[Callback]:
    theirs, mine = _listed(config.get("callbacks")), list(ours)
    if config.get("enable_progress_bar") is False or any(isinstance(c, ProgressBar) for c in theirs):
        mine = [callback for callback in mine if not isinstance(callback, ProgressBar)]
    if any(isinstance(callback, TrainingHealth) for callback in theirs):
        mine = [callback for callback in mine if not isinstance(callback, TrainingHealth)]
    if config.get("enable_checkpointing") is False:
        mine = [callback for callback in mine if not isinstance(callback, KeepCheckpoints)]
    # Ours first: evidence must be in the ledger before a user's callback looks at it.
    return [*mine, *theirs]


PROCESS_KEYS = ("accelerator", "devices", "num_nodes", "strategy", "precision", "plugins", "sync_batchnorm")
FSDP2 = """\
the one student goes through several fits, so it is sharded by FSDP2: use --trainer.strategy fsdp (or \
ModelParallelStrategy); PyTorch's older FSDP would wrap it anew in each fit"""


def with_strategy(config: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's configuration with `fsdp`, or a ModelParallelStrategy of any size, as FSDP2 over all processes.

    Raises:
        ValueError: a strategy that cannot train one student through several fits.
    """
    wanted = config.get("strategy")
    if isinstance(wanted, FSDPStrategy):
        raise ValueError(f"trainer.strategy: {FSDP2}")
    if wanted in ("fsdp", "ModelParallelStrategy"):  # a bare class name reaches us as text
        wanted = ModelParallelStrategy()
    if not isinstance(wanted, ModelParallelStrategy):
        return config
    if tensor_parallel_size(wanted) not in ("auto", 1):
        raise ValueError("trainer.strategy: tensor_parallel_size must be 1 (the student is sharded over all processes)")
    sharded = ShardedStrategy(
        data_parallel_size=world_size(),
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend=wanted.process_group_backend,
        timeout=group_timeout(wanted),
    )
    return {**config, "strategy": sharded}


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose checkpoints are those of one process: one file, gathered a tensor at a time, of what is trained."""

    lightning_restore_optimizer = True  # type: ignore[assignment]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        gathered = ((n, p) for n, p in self.lightning_module.named_parameters() if p.requires_grad)
        return {name: whole for name, p in gathered if (whole := _whole(p)) is not None}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = plain.state_dict()
        moments = {i: {name: _whole(value) for name, value in kept.items()} for i, kept in state["state"].items()}
        return {**state, "state": moments}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        mine = dict(self.lightning_module.named_parameters())
        for name, tensor in checkpoint["state_dict"].items():
            mine[name].copy_(like(mine[name], tensor))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                i: {name: like(parameters[i], v) if v.shape == parameters[i].shape else v for name, v in kept.items()}
                for i, kept in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": moments})


def _whole(tensor: Tensor) -> Tensor | None:
    """A tensor without its sharding, on the CPU of the first process alone; every process must ask for it in step."""
    whole = tensor.detach()
    whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
    return whole.to("cpu", copy=True) if is_first() else None


PATIENCE_S = 15.0
"""For the other processes to end when one has failed."""


class Processes:
    """The processes that a Trainer of this configuration runs in, and this one's device.

    Lightning would start the others at the first `fit`; here they start before it, since measuring, the Bridge and the
    benchmarks are shared out too. A later Trainer finds itself inside a running group.

    Raises:
        ValueError: the strategy cannot train one student through several fits, or starts processes by forking.
    """

    def __init__(self, config: dict[str, Any], backend: BackendSettings | None = None) -> None:
        """
        Args:
            config: keyword arguments of the Trainer.
            backend: holds in every process while it runs.
        """
        self._backend = backend or BackendSettings()
        kept = {key: config[key] for key in PROCESS_KEYS if config.get(key) is not None}
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(**with_strategy(kept), **quiet)
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
            raise ValueError(f"trainer.strategy: {type(strategy).__name__} is not supported; there are ddp and fsdp")
        self.device = torch.device(strategy.root_device)
        self._precision = trainer.precision_plugin
        self.precision = str(trainer.precision)
        self.shards = trainer.world_size if isinstance(strategy, ModelParallelStrategy) else 1
        """Processes that the weights are spread over."""
        self._strategy: DDPStrategy | None = None
        if isinstance(strategy, ParallelStrategy):
            # One way to start them, whatever the fits will do: the same processes and the same group serve both.
            same = DDPStrategy(process_group_backend=strategy.process_group_backend, timeout=group_timeout(strategy))
            ddp = L.Trainer(**{**kept, "strategy": same, "precision": None}, **quiet)
            assert isinstance(ddp.strategy, DDPStrategy)
            self._strategy = ddp.strategy
        by_script = strategy.launcher is None or starts_by_script(strategy.launcher)
        if isinstance(strategy, ParallelStrategy) and not by_script:
            raise ValueError(f"trainer.strategy: {config['strategy']!r} forks or spawns this process; use ddp or fsdp")

    def place(self, student: Student) -> None:
        """The student on this process's device, in the precision that a Trainer would give it at the first fit."""
        self._precision.convert_module(student)
        student.to(self.device)

    def run(self, job: Callable[[], T]) -> T:
        """Starts the other processes, which run the same command up to this point, and does `job` in each."""
        with applied(self._backend, self.device):
            return job() if self._strategy is None else self._run_together(job, self._strategy)

    def _run_together(self, job: Callable[[], T], strategy: DDPStrategy) -> T:
        launcher = strategy.launcher

        def joined() -> T:
            strategy.setup_environment()
            open_objects()
            return job()

        try:
            if launcher is None:
                return joined()
            with patient_observer(PATIENCE_S):
                return launcher.launch(joined)
        except BaseException:
            end_processes(started_processes(launcher))
            raise
        finally:
            close()


def end_processes(processes: Sequence[subprocess.Popen[Any]], patience_s: float = PATIENCE_S) -> None:
    """Asks processes to end, and kills those that are still there some seconds later.

    One that waits within CUDA or NCCL for a process that has failed does not hear SIGTERM.
    """
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("process %d did not end within %g s of SIGTERM: killed", process.pid, patience_s)
            process.kill()
            process.wait()
