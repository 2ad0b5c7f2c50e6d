"""SIGTERM means: leave soon. Between two steps a fit saves and goes; anything else is dropped, since it is noted.

Python runs a handler in the main thread alone, between two of its own instructions. A main thread that waits within
CUDA or NCCL for another process never comes to that, so a thread of ours watches the signals too and ends the process
where a first one has no effect.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_STATUS = 128 + signal.SIGTERM
GRACE_SECONDS = 20.0
"""For the step at hand. Schedulers commonly kill after 30."""
LAST_SECONDS = 5.0
"""After the grace, or after a second signal: for what is open to be closed."""
ENDS = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a process to end."""

_requested = False
_steps_end_soon = False
_sender: socket.socket | None = None
"""Where Python writes the number of each signal, whatever the main thread does; our thread reads the other end."""


def listen() -> None:
    """Handles SIGTERM from now on, where this is the main thread; other threads cannot."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_signal)
        _watch_signals()


@contextmanager
def listening() -> Iterator[None]:
    """Handles SIGTERM within, and puts back what was there before: the process is another's, such as a notebook's.

    So there is no thread either that ends it where the main thread does not hear.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


# -- where the main thread does not hear ------------------------------------------------------------------------------


def _watch_signals() -> None:
    """Starts the thread that ends the process where the main thread does not; once a process."""
    global _sender
    if _sender is None:
        receiver, _sender = socket.socketpair()
        _sender.setblocking(False)
        threading.Thread(target=_end_hard, args=(receiver,), name="signals", daemon=True).start()
        os.register_at_fork(after_in_child=_forget)
    signal.set_wakeup_fd(_sender.fileno(), warn_on_full_buffer=False)


def _forget() -> None:
    """In a fork, whose signals are no matter of this process."""
    signal.set_wakeup_fd(-1)


def _end_hard(receiver: socket.socket) -> None:
    """Ends the process when it is still there some seconds after it was told to leave, and sooner when told again."""
    number, deadline = 0, math.inf
    while True:
        receiver.settimeout(None if deadline == math.inf else max(0.01, deadline - time.monotonic()))
        try:
            came = receiver.recv(1)[0]
        except TimeoutError:
            os.write(
                2, f"process {os.getpid()} did not end after signal {number}: it is ended without more ado\n".encode()
            )
            os._exit(128 + number)
        if came in ENDS:
            told_again, number = number != 0, came
            wait = LAST_SECONDS if told_again else GRACE_SECONDS + LAST_SECONDS
            if told_again or came == signal.SIGTERM:  # after a first Ctrl-C a person may wait as long as they like
                deadline = min(deadline, time.monotonic() + wait)
