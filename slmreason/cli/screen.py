"""The screen while a command runs: our own lines, and of the libraries' only what a user can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from rich.logging import RichHandler

from slmreason.runtime.redact import SafeFormatter, shown

LIBRARIES = ("lightning.pytorch", "lightning.fabric", "httpx", "httpx2", "openai", "transformers")
"""Their loggers speak of errors alone."""
KNOWN_WARNINGS = (
    "does not have many workers",  # the planned batches are made in memory; workers would only add copies
    "Checkpoint directory",
    "number of training batches",
    "Experiment logs directory",  # the stage's folder holds its set before the logger comes
    "You have overridden `transfer_batch_to_device`",
    "isinstance.treespec, LeafSpec",
    "`is_gradient_checkpointing` is deprecated",  # peft's, not ours
    "It is recommended to use `self.log.*sync_dist=True",  # what is logged is summed over the processes already
)
"""Of libraries, about nothing that a user can change."""


class LineHandler(logging.Handler):
    """Prints a message as one line, which rich would break at 80 columns where there is no terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), flush=True)
        except Exception:
            self.handleError(record)


def quiet() -> None:
    """From now on the screen is ours."""
    handler: logging.Handler = LineHandler()
    if get_console().is_terminal:
        handler = RichHandler(show_path=False, show_level=False, show_time=False, markup=False, highlighter=None,
                              keywords=[])  # fmt: skip
    handler.setFormatter(SafeFormatter())
    ours = logging.getLogger("slmreason")
    ours.handlers[:] = [handler]
    ours.propagate = False
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.ERROR)
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.setLevel(logging.ERROR)
        library.handlers[:] = [handler]
    transformers.utils.logging.disable_progress_bar()
    for known in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{known}.*")


@contextmanager
def put_back() -> Iterator[None]:
    """What `quiet` changes within is as before when it is left."""
    loggers = [logging.getLogger(name) for name in ("slmreason", *LIBRARIES)]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    had_bars = transformers.utils.logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
                logger.handlers[:] = handlers
                logger.setLevel(level)
                logger.propagate = propagate
            if had_bars:
                transformers.utils.logging.enable_progress_bar()


def tell(line: str) -> None:
    """Prints a line that a person may copy a command from: nothing breaks it, however narrow the terminal is."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        print(shown(line), flush=True)
