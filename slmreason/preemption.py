"""SIGTERM means: leave soon. Between two steps a fit saves and goes; anything else is dropped, since it is noted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_STATUS = 128 + signal.SIGTERM
GRACE_SECONDS = 20.0
"""For the step at hand. Schedulers commonly kill after 30."""

_requested = False
_steps_end_soon = False


def listen() -> None:
    """Handles SIGTERM from now on, where this is the main thread; other threads cannot."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_signal)


def requested() -> bool:
    """True when the process was told to leave while a fit was in the middle of a step."""
    return _requested


@contextmanager
def between_steps() -> Iterator[None]:
    """Within it a first SIGTERM waits for `requested()` to be asked; outside it ends the process at once."""
    global _steps_end_soon, _requested
    _steps_end_soon = True
    try:
        yield
    finally:
        _steps_end_soon = _requested = False


def _on_signal(number: int, frame: Any) -> None:
    global _requested
    if not _steps_end_soon or _requested:
        raise SystemExit(EXIT_STATUS)
    _requested = True
    timer = threading.Timer(GRACE_SECONDS, _again)
    timer.daemon = True
    timer.start()


def _again() -> None:
    if _requested:  # the step did not end in time: the newest checkpoint must do
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
