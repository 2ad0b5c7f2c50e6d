"""A process that compares expressions with math-verify: `python -m slmreason.verify.process_worker MEMORY_MB`.

Reads lines of JSON `[seconds of processor time, answer, gold]` (and a margin, where a number may differ), says `equal`,
`different`, `memory`, `timeout` or `died` to each, and ends with its input. The comparing is done by a fork of it,
which shares the parser's tables and can be killed and replaced in a moment: math-verify's own limits are signals that
Python must handle, and so do not end a long computation in C.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable

from slmreason.verify.process_pool import WALL

Ask = Callable[..., str]
"""The parts of a line to what is said to it."""
RIGHT = ("equal", "score 1.0")
LIMITS = ("memory", "timeout", "died")


def compare(answer: str, gold: str, margin: str = "") -> str:
    """Whether two expressions are equal."""
    from slmreason.verify.algebra import same_expression

    return "equal" if same_expression(answer, gold, margin) else "different"


def _reply(ask: Ask, parts: list[str], most: float) -> str:
    """The ruling. Where memory ran short inside of a library it may say no, so a no above `most` MiB is none."""
    said = "different"
    try:
        said = ask(*parts)
        if said in RIGHT:
            return said
    except MemoryError:
        return "memory"
    except Exception:
        pass
    return "memory" if _peak_mb() > most else said


class _Fork:
    """A child that compares pairs until it is killed, and the two pipes to it."""

    def __init__(self, ask: Ask, most: float) -> None:
        questions, self.questions = os.pipe()
        self.replies, replies = os.pipe()
        self.status: int | None = None
        """How it ended, once that is known."""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.questions)
            os.close(self.replies)
            _answer_all(questions, replies, ask, most)
        os.close(questions)
        os.close(replies)

    def ask(self, line: bytes, seconds: float) -> str:
        """What the child says, `timeout` when it says nothing in time, `died` when it ends instead.

        Args:
            seconds: of processor time; the child is ended by the kernel when it has used them.
        """
        with contextlib.suppress(BrokenPipeError):
            os.write(self.questions, line)
        deadline = time.monotonic() + WALL * seconds + 1
        heard = b""
        while not heard.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.replies], [], [], left)[0]:
                return "timeout"
            part = os.read(self.replies, 64)
            if not part:
                self.status = os.waitpid(self.pid, 0)[1]
                out_of_time = os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGPROF
                return "timeout" if out_of_time else "died"
            heard += part
        return heard.decode().strip()

    def end(self) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.questions)
        os.close(self.replies)


def _answer_all(questions: int, replies: int, ask: Ask, most: float) -> None:
    """The child's life. It ends with the one who asks, or by itself should that one have been killed."""
    _die_with_parent()
    with os.fdopen(questions, "rb") as lines:
        for line in lines:
            seconds, *parts = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, in C too
            signal.alarm(math.ceil(WALL * seconds) + 2)
            reply = _reply(ask, parts, most)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            with contextlib.suppress(BrokenPipeError):
                os.write(replies, f"{reply}\n".encode())
    os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def serve(memory_mb: int, ask: Ask, warm_up: Callable[[], object]) -> None:
    """Answers until the input ends.

    Args:
        ask: what a fork says to the parts of a line; an exception means `different`.
        warm_up: what the forks share, and no answer should wait for.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    _limit_memory(memory_mb)
    warm_up()
    idle = _peak_mb()
    if idle >= memory_mb:  # it has that already: each comparison would fail
        sys.exit(f"memory_mb must be above {idle:.0f}, which is what a worker has before the first comparison")
    most = idle + (memory_mb - idle) / 2  # what failed for want of memory may have asked for as much again
    gc.freeze()  # the tables stay shared between the forks
    child = _Fork(ask, most)
    print("ready", file=replies, flush=True)
    for line in sys.stdin.buffer:
        reply = child.ask(line, float(json.loads(line)[0]))
        if reply in LIMITS:
            child.end()
            child = _Fork(ask, most)
        print(reply, file=replies, flush=True)
    child.end()


def _limit_memory(memory_mb: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_mb * 2**20 if hard == resource.RLIM_INFINITY else min(memory_mb * 2**20, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ValueError, OSError):
        if sys.platform == "linux":  # elsewhere the kernel may not know this limit
            raise


def _peak_mb() -> float:
    """The most address space that this process ever had, in MiB; 0 where the kernel does not tell."""
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) / 1024 for line in file if line.startswith("VmPeak:")), 0.0)
    except OSError:
        return 0.0


if __name__ == "__main__":
    import slmreason.verify.algebra  # noqa: F401 - before memory is limited

    # The first comparison builds the parser's tables.
    serve(int(sys.argv[1]), compare, lambda: compare(r"\frac{1}{2}", "x"))
