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

from slmreason.verify.algebra import same_expression
from slmreason.verify.process_pool import WALL


def _reply(answer: str, gold: str, margin: str, most: float) -> str:
    """The ruling. Where memory ran short inside of math-verify it may say no, so a no above `most` MiB is none."""
    try:
        if same_expression(answer, gold, margin):
            return "equal"
    except MemoryError:
        return "memory"
    except Exception:
        pass
    return "memory" if _peak_mb() > most else "different"


class _Fork:
    """A child that compares pairs until it is killed, and the two pipes to it."""

    def __init__(self, most: float) -> None:
        questions, self.questions = os.pipe()
        self.replies, replies = os.pipe()
        self.status: int | None = None
        """How it ended, once that is known."""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.questions)
            os.close(self.replies)
            _compare_all(questions, replies, most)
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


def _compare_all(questions: int, replies: int, most: float) -> None:
    """The child's life. It ends with the one who asks, or by itself should that one have been killed."""
    _die_with_parent()
    with os.fdopen(questions, "rb") as lines:
        for line in lines:
            seconds, answer, gold, *margin = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, in C too
            signal.alarm(math.ceil(WALL * seconds) + 2)
            reply = _reply(answer, gold, margin[0] if margin else "", most)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            with contextlib.suppress(BrokenPipeError):
                os.write(replies, f"{reply}\n".encode())
    os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def main(memory_mb: int) -> None:
    """Answers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    _limit_memory(memory_mb)
    same_expression(r"\frac{1}{2}", "x")  # builds the parser's tables, which should not be on the first pair's time
    idle = _peak_mb()
    if idle >= memory_mb:  # it has that already: each comparison would fail
        sys.exit(f"memory_mb must be above {idle:.0f}, which is what a worker has before the first comparison")
    most = idle + (memory_mb - idle) / 2  # what failed for want of memory may have asked for as much again
    gc.freeze()  # the tables stay shared between the forks
    child = _Fork(most)
    print("ready", file=replies, flush=True)
    for line in sys.stdin.buffer:
        reply = child.ask(line, float(json.loads(line)[0]))
        if reply not in ("equal", "different"):
            child.end()
            child = _Fork(most)
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
    main(int(sys.argv[1]))
