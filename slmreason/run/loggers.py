"""The loggers of a run: one experiment over all its fits, whose steps go on where the fit before it ended.

A fit counts its steps from 0, and Lightning finishes its loggers with it. A logger that a run is given stays what it
is, and two of its methods change: what is logged is logged at the run's step, beside the tokens of the run, and the end
of a fit is not the end of the experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from slmreason.run.metrics import continued_writer
from slmreason.runtime.distributed import is_first
from slmreason.runtime.lightning_internals import (
    rename,
    set_csv_writer,
    set_mlflow_run,
    set_version,
    tensorboard_options,
    wandb_options,
)

TOKENS = "tokens/total"
"""What the run has cost, beside every number: the other axis."""


@dataclass
class Axis:
    """Where a run stands on the axes of its loggers. Its checkpoints have it."""

    steps: int = 0
    """Of the fits that are over, each as many as its `metrics.csv` counts: optimizer steps of SFT and CFT, and batches
    of GRPO."""
    in_fit: int = 0
    """Steps of the fit at hand."""
    spent: dict[str, int] = field(default_factory=dict)
    """Tokens by what they went into, besides the fits."""
    shown: dict[str, float] = field(default_factory=dict)
    """What was logged between two steps, at `shown_at`: a run that goes on from there logs it anew."""
    shown_at: int = 0

    @property
    def step(self) -> int:
        """Of the whole run."""
        return self.steps + self.in_fit

    def copy(self, in_fit: int) -> Axis:
        """As it stands now, so many steps into a fit."""
        return replace(self, in_fit=in_fit, spent=dict(self.spent), shown=dict(self.shown))


class RunLogger(Logger):
    """What a logger of a run does otherwise than its class (`of_run`)."""

    axis: Axis
    tokens: Callable[[], int]
    spelled: Callable[[str], str]
    """A metric's name as the logger takes it."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs at the run's step.

        Args:
            step: of the fit; what is logged without one stands at the run's newest that is known.
        """
        named = {self.spelled(name): value for name, value in metrics.items()}
        at = self.at_step(self.axis.in_fit if step is None else step)
        super().log_metrics({**named, self.spelled(TOKENS): float(self.tokens())}, at)  # type: ignore[safe-super]

    def at_step(self, step: int) -> int:
        """The run's step, given the fit's."""
        return self.axis.steps + step

    def finalize(self, status: str) -> None:
        """A fit is over, and the experiment goes on."""
        self.save()

    def finish(self, status: str) -> None:
        """The run is over.

        Args:
            status: `success`, or `failed`.
        """
        super().finalize(status)


def of_run(logger: Logger, axis: Axis, tokens: Callable[[], int]) -> RunLogger:
    """The same logger, of a class below its own that is a `RunLogger` too: callbacks still know it for what it is.

    Args:
        tokens: gives what the run has cost.
    """
    own = type(logger)
    name = f"of_run.<locals>.{own.__name__}"  # a local class: in a later config the name means the logger's own
    logger.__class__ = type(own.__name__, (RunLogger, own), {"__module__": __name__, "__qualname__": name})
    assert isinstance(logger, RunLogger)
    logger.axis, logger.tokens = axis, tokens
    logger.spelled = _as_mlflow_spells if isinstance(logger, MLFlowLogger) else str
    return logger


def _as_mlflow_spells(name: str) -> str:
    """MLflow takes no `@`: Lightning would leave it out of `val/pass@1`, with a warning."""
    return name.replace("@", "_at_")


def step_of(logger: object, step: int) -> int:
    """The step at which something is handed to what a logger wraps, past its `log_metrics`; `step` is the fit's."""
    return logger.at_step(step) if isinstance(logger, RunLogger) else step


# -- beginning, going on, ending ------------------------------------------------------------------------------------


def name_after(logger: Logger, run: str) -> None:
    """Names an experiment after its run: a folder below the logger's own, and a name where the user gave none."""
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        rename(logger, f"{logger.name}/{run}".lstrip("/"))
    elif isinstance(logger, WandbLogger):
        options = wandb_options(logger)
        options["name"] = options["name"] or run
    elif isinstance(logger, MLFlowLogger):
        set_mlflow_run(logger, name=run)


def leave_open_run() -> None:
    """Ends a run of W&B that this process has open: it would be taken for the one that begins."""
    import wandb

    if wandb.run is not None:
        wandb.finish()


def begin(logger: Logger) -> int | str | None:
    """Begins the experiment.

    Returns:
        What tells it from others: `go_on` takes it.
    """
    if isinstance(logger, WandbLogger):
        _ = logger.experiment  # its id is known from here on
    version = logger.version
    if isinstance(logger, TensorBoardLogger):
        _ = logger.experiment  # its folder is there from here on: the next experiment has the next number
    return version


def go_on(logger: Logger, version: int | str | None, step: int | None) -> bool:
    """Goes on with an experiment that was begun by an earlier process.

    Args:
        version: what `begin` gave.
        step: of the whole run, with which it goes on: what an earlier process logged from there on is left out, where
            the kind of logger can do that; None leaves out nothing.

    Returns:
        False where it is not known how such a logger does that: it begins another experiment.
    """
    resume = getattr(logger, "resume", None)
    if isinstance(logger, CSVLogger) and version is not None:
        set_version(logger, version)
        set_csv_writer(logger, continued_writer(logger.log_dir, step))
    elif isinstance(logger, TensorBoardLogger) and version is not None:
        set_version(logger, version)
        if step is not None:
            tensorboard_options(logger)["purge_step"] = step
        _ = logger.experiment
    elif isinstance(logger, WandbLogger):
        wandb_options(logger)["id"] = version
        _ = logger.experiment
    elif isinstance(logger, MLFlowLogger) and version is not None:
        set_mlflow_run(logger, run_id=str(version))
        logger.experiment.update_run(logger.run_id, status="RUNNING")
    elif callable(resume):
        resume(version, step)
    else:
        return False
    return True


def tell_config(logger: Logger, config: Mapping[str, Any], text: str, is_new: bool) -> None:
    """Gives the config of the run to a logger.

    Args:
        config: nested, as it stands in the file.
        text: the file.
        is_new: the experiment begins; MLflow takes a parameter once.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(dict(config), metrics={})  # else it would log a metric named hp_metric
        if is_new:
            logger.experiment.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), 0)
    elif isinstance(logger, MLFlowLogger):
        if is_new:
            logger.log_hyperparams(_dotted(config))
    else:
        logger.log_hyperparams(dict(config))


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"grpo.group_size": 8, ...}`: parameters under the keys of the config."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _dotted(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def end(logger: RunLogger, status: str) -> None:
    """Ends the experiment, in the process that has it.

    Args:
        status: `success`, or `failed`.
    """
    logger.finish(status)
    if isinstance(logger, WandbLogger) and is_first():
        logger.experiment.finish(exit_code=0 if status == "success" else 1)
