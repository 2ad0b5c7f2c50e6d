"""What the loggers of a run show: each fit at the run's steps, and between the fits what no Trainer knows of."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.loggers import Logger, WandbLogger

from slmreason.evaluate.benchmarks import Score
from slmreason.records import Tokens
from slmreason.run.files import write_text
from slmreason.run.folder import RunFolder
from slmreason.run.loggers import Axis, RunLogger, begin, end, go_on, leave_open_run, name_after, of_run, tell_config
from slmreason.runtime.distributed import first_only, is_first
from slmreason.runtime.lightning_internals import logging_step

log = logging.getLogger(__name__)


class Experiment:
    """One experiment over all fits of a run, in each logger that it was given; none is needed."""

    def __init__(self, given: Sequence[Logger], files: RunFolder, tokens: Callable[[], Tokens]) -> None:
        """
        Args:
            given: of the config.
            tokens: gives what the run has cost.
        """
        self.axis = Axis()
        self.files, self.tokens = files, tokens
        self.loggers: list[RunLogger] = [of_run(logger, self.axis, lambda: self.tokens().total) for logger in given]
        self._trainer: L.Trainer | None = None

    # -- beginning and end ------------------------------------------------------------------------------------------

    def open(self, axis: Axis, is_within: bool) -> None:
        """Begins the experiment, or goes on with the one that an earlier process began.

        Args:
            axis: where the run stands.
            is_within: in a fit.

        Raises:
            ValueError: a logger cannot; the message names its class and says why.
        """
        self.axis = axis
        for logger in self.loggers:
            logger.axis = axis
            name_after(logger, self.files.path.absolute().name)
        if self.loggers:
            first_only(lambda: self._open(is_within))

    def _open(self, is_within: bool) -> None:
        path, step = self.files.experiments, self.axis.step
        begun = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        if any(isinstance(logger, WandbLogger) for logger in self.loggers):
            leave_open_run()
        # Before its first step a fit has been cut off by a signal alone, and what stands at that step came before it.
        purged = None if is_within and not self.axis.in_fit else step
        versions: list[dict[str, Any]] = []
        for number, logger in enumerate(self.loggers):
            versions.append(_begun(logger, begun[number] if number < len(begun) else None, purged))
        write_text(path, json.dumps(versions, indent=1) + "\n")
        self._tell_config(is_new=not begun)
        if begun and self.axis.shown and self.axis.shown_at == step and purged is not None:
            self.log(self.axis.shown)

    def _tell_config(self, is_new: bool) -> None:
        if not self.files.config.is_file():
            return
        text = self.files.config.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        for logger in self.loggers:
            with _named(logger):
                tell_config(logger, config, text, is_new)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Ends the experiment when it is left, as one that failed where an error is passed on."""
        try:
            yield
        except BaseException:
            self._end("failed")
            raise
        self._end("success")

    def _end(self, status: str) -> None:
        for logger in self.loggers:
            try:
                end(logger, status)
            except Exception as error:  # all of the run's own is on the disk
                log.warning("trainer.logger: %s could not be ended: %s", type(logger).__name__, error)

    # -- a fit ------------------------------------------------------------------------------------------------------

    @contextmanager
    def fit(self, trainer: L.Trainer) -> Iterator[None]:
        """Within it the run's step moves with the fit's."""
        self._trainer = trainer
        try:
            yield
        finally:
            self.axis.steps += self._in_fit
            self.axis.in_fit, self._trainer = 0, None

    def here(self) -> Axis:
        """Where the run stands, for a checkpoint."""
        return self.axis.copy(self._in_fit)

    @property
    def _in_fit(self) -> int:
        return self.axis.in_fit if self._trainer is None else logging_step(self._trainer)

    # -- what it shows ----------------------------------------------------------------------------------------------

    def show(self, metrics: dict[str, float]) -> None:
        """Logs what is known between two steps, and what the tokens of the run went into so far."""
        metrics = metrics | token_metrics(self.tokens(), self.axis.spent)
        step = self.axis.steps + self._in_fit
        if step != self.axis.shown_at:
            self.axis.shown, self.axis.shown_at = {}, step
        self.axis.shown |= metrics
        self.log(metrics)

    def show_bands(self, counts: dict[str, int]) -> None:
        """How many problems are in each band."""
        self.show({f"bands/{band}": float(count) for band, count in counts.items()})

    def show_scores(self, scores: Sequence[Score]) -> None:
        """What the benchmarks came to."""
        self.show({f"benchmark/{score.benchmark}/{score.metric}": score.value for score in scores})

    def log(self, metrics: dict[str, float]) -> None:
        """Logs what belongs to the step at hand."""
        if not is_first():
            return
        for logger in self.loggers:
            logger.log_metrics(metrics, self._in_fit)
            logger.save()


def token_metrics(tokens: Tokens, spent: dict[str, int]) -> dict[str, float]:
    """What the tokens of a run are, and what they went into.

    Args:
        spent: on anything but the fits.
    """
    kinds = {f"tokens/{kind}": float(count) for kind, count in tokens.as_summary().items()}
    uses = {**spent, "fits": tokens.total - sum(spent.values())}
    return kinds | {f"spent/{use}": float(count) for use, count in uses.items()}


def _begun(logger: RunLogger, before: dict[str, Any] | None, step: int | None) -> dict[str, Any]:
    """What tells a logger's experiment from others, once it has begun or goes on.

    Args:
        before: what this gave in an earlier process.
        step: that it goes on with, of the whole run; None where nothing that was logged is to be left out.
    """
    name = type(logger).__name__
    with _named(logger):
        if before is not None and go_on(logger, before["version"], step):
            return before
        if before is not None:
            log.info("trainer.logger: %s begins another experiment, since it has no method `resume(version, step)`",
                     name)  # fmt: skip
        return {"logger": name, "version": begin(logger)}


@contextmanager
def _named(logger: Logger) -> Iterator[None]:
    """
    Raises:
        ValueError: anything went wrong within; the message names the logger.
    """
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"trainer.logger: {type(logger).__name__} cannot begin: {why}") from error
