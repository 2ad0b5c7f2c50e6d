"""Comparisons that may hang or eat the machine, each in a process that can be killed.

The processes are started by `subprocess` and not by `multiprocessing`: a dataloader's worker is daemonic and may have
no children of the latter kind, and a fork would copy threads and CUDA. The time limit is kept by whoever waits, so it
holds in any thread; a signal would reach the main thread only. Linux and macOS; the memory limit is Linux's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait

Pair = tuple[str, ...]
"""An answer and the gold answer, two expressions; behind them the margin of a number, where there is one."""
MAX_WORKERS = 4
START_SECONDS = 120.0
"""A process that is not ready by then will never be. It takes half a second, on a crowded machine some more."""
WALL = 4
"""A comparison may take so many times its processor time by the clock (`slmreason.verify.process_worker`)."""
GRACE_SECONDS = 5.0
"""A process keeps the time of its comparisons itself; it is killed when it does not answer even so much later."""
LEAST_SECONDS = 0.05
"""What a comparison may take when the call's budget is used up; ordinary ones take milliseconds."""
MAX_KNOWN = 65_536
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME")


@dataclass(frozen=True)
class Limits:
    """What comparisons may take."""

    workers: int | None = None
    """Processes; None takes one for each core this process may use, at most four."""
    timeout_s: float = 3.0
    """Seconds of processor time a comparison may take before its process is killed, and about four times as many by
    the clock. Ordinary ones take milliseconds."""
    memory_mb: int = 1024
    """MiB of address space a process may have; an idle one has about 100."""
    budget_s: float = 10.0
    """Seconds that one call may lose to comparisons without a verdict, all processes together. As it is used up,
    comparisons are given less time than `timeout_s`, down to a twentieth of a second."""

    def __post_init__(self) -> None:
        if (self.workers is not None and self.workers < 1) or self.timeout_s <= 0 or self.memory_mb < 1:
            raise ValueError("reward: workers and memory_mb must be at least 1, timeout_s above 0")
        if self.budget_s <= 0:
            raise ValueError("reward: budget_s must be above 0")

    def seconds(self, lost: float) -> float:
        """What the next comparison may take in a call that has lost so many seconds."""
        return min(self.timeout_s, max(LEAST_SECONDS, (self.budget_s - lost) / 2))

    @property
    def num_workers(self) -> int:
        return self.workers or min(MAX_WORKERS, _num_cores())


DEFAULT = Limits()


@dataclass(frozen=True)
class Ruling:
    """Whether an answer is right, and by which limit it was refused if it never came to a verdict."""

    correct: bool
    limit: str | None = None
    """`timeout`, `memory`, `died`, `too large` or `other problem`; None for a verdict."""
    score: float = 0.0
    """From 0 to 1, where the worker gives one."""


RIGHT, WRONG = Ruling(True), Ruling(False)
_REPLIES = {
    b"equal\n": RIGHT,
    b"different\n": WRONG,
    **{f"{limit}\n".encode(): Ruling(False, limit) for limit in ("memory", "timeout", "died", "other problem")},
}
_READY = b"ready\n"
COMPARES = "slmreason.verify.process_worker"
"""The module whose processes compare two expressions."""


class Pool:
    """Workers that compare expressions, started when there is something to compare.

    Threads take turns. A forked process starts workers of its own, and those of a parent that is gone end by
    themselves (`slmreason.verify.process_worker`).
    """

    def __init__(self, limits: Limits = DEFAULT, worker: str = COMPARES) -> None:
        """
        Args:
            worker: module that a process runs; it answers lines as `process_worker.serve` does.
        """
        self.limits, self.worker = limits, worker
        self._known: dict[Pair, Ruling] = {}
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end_all, self._workers)  # when collected, or when the interpreter exits
        _pools.add(self)

    def compare(self, pairs: Sequence[Pair]) -> list[Ruling]:
        """The ruling on each pair, in their order. Verdicts are remembered, and so is what met a limit.

        Only a comparison whose process died is tried again: somebody else may have killed it.

        Raises:
            RuntimeError: a worker cannot be started.
        """
        with self._lock:
            rulings = {pair: self._known[pair] for pair in pairs if pair in self._known}
            found = self._ask([pair for pair in dict.fromkeys(pairs) if pair not in rulings])
            self._known |= {pair: ruling for pair, ruling in found.items() if ruling.limit != "died"}
            while len(self._known) > MAX_KNOWN:
                del self._known[next(iter(self._known))]
        rulings |= found
        return [rulings[pair] for pair in pairs]

    def close(self) -> None:
        """Ends the workers; the next comparison starts new ones."""
        with self._lock:
            _end_all(self._workers)

    def pids(self) -> list[int]:
        """The processes of the workers that are there now."""
        return [worker.process.pid for worker in self._workers]

    def _ask(self, pairs: Sequence[Pair]) -> dict[Pair, Ruling]:
        rulings: dict[Pair, Ruling] = {}
        lost = 0.0
        waiting = deque(pairs)
        for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
            self._dismiss(worker)  # it died between two calls, perhaps before it was ready: no failure to start
        try:
            while len(rulings) < len(pairs):
                self._staff(len(pairs) - len(rulings))
                for worker in self._workers:
                    if worker.is_idle and waiting:
                        worker.ask(waiting.popleft(), self.limits.seconds(lost))
                for pair, ruling, allowed in self._hear():
                    rulings[pair] = ruling
                    lost += allowed if ruling.limit else 0.0
        except BaseException:
            _end_all(self._workers)  # else their answers to these would be taken for answers to the next
            raise
        return rulings

    def _staff(self, wanted: int) -> None:
        """Replaces the workers that died idle; has as many as there are pairs to compare, if the limit allows."""
        for worker in [worker for worker in self._workers if worker.is_idle and worker.process.poll() is not None]:
            self._dismiss(worker)
        while len(self._workers) < min(wanted, self.limits.num_workers):
            self._workers.append(_Worker(self.limits, self.worker))

    def _hear(self) -> Iterator[tuple[Pair, Ruling, float]]:
        """Waits for the first replies or the first limit: (pair, ruling, seconds that it was allowed)."""
        busy = [worker for worker in self._workers if not worker.is_idle]
        first = min(worker.deadline for worker in busy)
        heard = wait([worker.replies for worker in busy], max(0.0, first - time.monotonic()))
        for worker in busy:
            has_replied = worker.replies in heard
            if not has_replied and time.monotonic() < worker.deadline:
                continue
            pair, allowed = worker.pair, worker.allowed_s
            ruling = worker.hear() if has_replied else worker.give_up()
            if worker.has_ended:
                self._dismiss(worker)
            if pair is not None and ruling is not None:
                yield pair, ruling, allowed

    def _dismiss(self, worker: _Worker) -> None:
        worker.end()
        self._workers.remove(worker)

    def _forget(self) -> None:
        """In a forked process: the workers are the parent's, and so is whoever holds the lock."""
        for worker in self._workers:
            worker.disown()
        self._workers.clear()
        self._lock = threading.Lock()


class _Worker:
    """A process and the pair it has in hand."""

    def __init__(self, limits: Limits, module: str = COMPARES) -> None:
        self.command = [sys.executable, "-P", "-m", module, str(limits.memory_mb)]
        self.process = subprocess.Popen(
            self.command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            process_group=0,  # Ctrl-C in a terminal is for the trainer
        )
        assert self.process.stdout is not None
        self.replies = self.process.stdout.fileno()
        self.pair: Pair | None = None
        self.is_ready = False
        self.has_ended = False
        """It must be replaced: it died, or it does not answer."""
        self.allowed_s = 0.0
        self.deadline = time.monotonic() + START_SECONDS

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.pair is None

    def ask(self, pair: Pair, seconds: float) -> None:
        """Hands over a pair, a line of at most 16 KB, which a pipe with nothing else in it takes at once."""
        assert self.process.stdin is not None
        self.pair, self.allowed_s = pair, seconds
        self.deadline = time.monotonic() + WALL * seconds + 1 + GRACE_SECONDS
        with suppress(BrokenPipeError):  # then it died, and the end of its replies says so
            self.process.stdin.write(json.dumps([seconds, *pair]).encode() + b"\n")

    def hear(self) -> Ruling | None:
        """What the process rules on its pair; None when it says that it has started."""
        reply = os.read(self.replies, 64)
        if not self.is_ready:
            if reply != _READY:
                raise RuntimeError(self._failure("ended while it started"))
            self.is_ready = True
            return None
        self.pair = None
        ruling = _ruling(reply)
        self.has_ended = ruling is None
        return ruling or Ruling(False, "died")

    def give_up(self) -> Ruling:
        """The ruling when the time is over."""
        if not self.is_ready:
            raise RuntimeError(self._failure(f"did not start within {START_SECONDS:g} s"))
        self.has_ended = True
        return Ruling(False, "timeout")

    def _failure(self, what: str) -> str:
        return f"a worker of the verifier {what}; is reward.memory_mb enough? Try: {' '.join(self.command)}"

    def end(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with its fork, which does the work
        self.process.kill()
        self.process.wait()
        self._close()

    def disown(self) -> None:
        self.process.returncode = 0  # else Popen would warn of a child still running, which is another process's
        self._close()

    def _close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _ruling(reply: bytes) -> Ruling | None:
    """What a line of a worker says; None where it says nothing that is known."""
    if reply.startswith(b"score ") and reply.endswith(b"\n"):
        with suppress(ValueError):
            score = float(reply[len("score ") :])
            return Ruling(correct=score >= 1, score=score)
    return _REPLIES.get(reply)


@cache
def shared_pool(limits: Limits, worker: str = COMPARES) -> Pool:
    """The pool that all graders with these limits share in this process."""
    return Pool(limits, worker)


def environment() -> dict[str, str]:
    """Where the process finds its modules, as this one does, and no keys or tokens: it reads what a model wrote.

    All such processes hash texts alike, so that what goes through a set is the same in each.
    """
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return kept | {"PYTHONPATH": paths, "PYTHONHASHSEED": "0"}


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _forget_all() -> None:
    for pool in _pools:
        pool._forget()


os.register_at_fork(after_in_child=_forget_all)
