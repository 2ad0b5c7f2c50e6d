"""vLLM in a worker process beside the trainer's: asked over a socket, given weights through memory that both see."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slmreason.rollout.engine import Completion, EngineError, Sampling
from slmreason.rollout.vllm.in_process import free_unused_memory
from slmreason.rollout.vllm.options import Spec
from slmreason.rollout.vllm.placement import starting
from slmreason.rollout.vllm.worker import ALIGNMENT, Entry, completions_of, receive, send, shared, view
from slmreason.runtime.redact import redact

START_S = 1800.0
"""A worker may take this long to start: on a GPU it may compile the model first."""
CHUNK_BYTES = 256 * 2**20
"""Weights are handed over in pieces of this size, or of the largest tensor's."""


class Worker:
    """A core in a process of its own, spoken to over a socket; weights go through memory that both see."""

    def __init__(self, spec: Spec, device: torch.device, largest: int = 0) -> None:
        """
        Args:
            largest: bytes of the largest weight that it will be given; 0 where it reads them from the disk.

        Raises:
            EngineError: the system has no shared memory, or vLLM cannot be started.
        """
        if not hasattr(os, "memfd_create"):
            raise EngineError("rollout.placement: a worker needs Linux; in_process does not")
        self.spec = spec
        free_unused_memory()  # the worker takes its share of what is free
        self._folder = tempfile.TemporaryDirectory(prefix="slmreason-vllm-", ignore_cleanup_errors=True)
        size = max(CHUNK_BYTES, largest)
        # Not in /dev/shm, which is small in many containers.
        buffer_fd = os.memfd_create("slmreason-weights")
        os.ftruncate(buffer_fd, size)
        self._buffer = shared(buffer_fd, size)
        ours, theirs = socket.socketpair()
        log, self._log = _new_log(spec.options.log_dir or self._folder.name)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "import sys; from slmreason.rollout.vllm.worker import main; "
             "main(*sys.argv[1:])", str(theirs.fileno()), str(buffer_fd), str(size), self._folder.name],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(device, self._folder.name),
            pass_fds=(theirs.fileno(), buffer_fd), start_new_session=True,
        )  # fmt: skip
        for descriptor in (theirs.detach(), buffer_fd, log):
            os.close(descriptor)
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._process, self._connection, self._folder, os.getpid())
        self._wait_at_most(START_S)
        with starting(spec, device):
            self._ask(f"starting vLLM with {spec.model}", spec)
        self._wait_at_most(spec.options.timeout_s)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `Core.load`."""
        free_unused_memory()  # the worker wakes, and takes back what it had given away
        doing = "taking the weights"
        self._send(("load", ()), doing)
        for entries in self._fillings(weights):
            self._send(entries, doing)
            self._receive(doing)
        self._ask(doing, None)

    def load_adapters(self, folder: str) -> str | None:
        """See `Core.load_adapters`."""
        free_unused_memory()
        refusal: str | None = self._ask("taking the adapters", ("load_adapters", [folder]))
        return refusal

    def _fillings(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[Entry]]:
        """Fills the shared buffer again and again, and yields what lies where in it."""
        entries: list[Entry] = []
        end = 0
        for name, tensor in weights:
            size = tensor.numel() * tensor.element_size()
            if end + size > len(self._buffer) and entries:
                yield entries
                entries, end = [], 0
            view(self._buffer, tensor.dtype, tuple(tensor.shape), end).copy_(tensor.detach())
            entries.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end))
            end = -(-(end + size) // ALIGNMENT) * ALIGNMENT
        if entries:
            yield entries

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, tick: Callable[[int, int], None]
    ) -> list[list[Completion]]:
        """See `Core.generate`."""
        free_unused_memory()
        doing = f"sampling {group_size} completions of each of {len(prompts)} prompts"
        request = ("generate", ([list(prompt) for prompt in prompts], group_size, sampling))
        return completions_of(self._ask(doing, request, tick))

    @property
    def folder(self) -> Path:
        """See `Placement.folder`."""
        return Path(self._folder.name)

    def close(self) -> None:
        """Ends the worker."""
        self._end()

    def _ask(self, doing: str, request: object, tick: Callable[[int, int], None] | None = None) -> Any:
        """Sends a request and waits for its result."""
        self._send(request, doing)
        while True:
            kind, value = self._receive(doing)
            if kind == "done":
                return value
            if tick is not None:
                tick(*value)

    def _send(self, message: object, doing: str) -> None:
        with self._explained(doing):
            send(self._connection, message)

    def _receive(self, doing: str) -> tuple[str, Any]:
        with self._explained(doing):
            kind, value = receive(self._connection)
        if kind == "failed":
            raise self._failure(f"failed while {doing}: {value}")
        return kind, value

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """A closed connection or a silent one, in words."""
        try:
            yield
        except BlockingIOError:
            raise self._failure(f"gave no sign of life for {self._patience:g} s while {doing}") from None
        except (EOFError, ConnectionError):
            raise self._failure(f"died while {doing}") from None

    def _failure(self, what: str) -> EngineError:
        """Ends the worker, whatever state it is in, and says how it ended and what it said last."""
        try:
            code = self._process.wait(timeout=1)
            how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            how = "killed now"
        lines = self._log.read_text(errors="replace").splitlines()[-20:]
        self.close()
        return EngineError(redact("\n".join([f"the vLLM worker {what} ({how}). The end of its log:", *lines])))

    def _wait_at_most(self, seconds: float) -> None:
        """Telling the worker something, or listening to it, ends after this long with BlockingIOError."""
        self._patience = seconds
        with socket.socket(fileno=os.dup(self._connection.fileno())) as same:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
                same.setsockopt(socket.SOL_SOCKET, option, value)


OF_THE_TRAINER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "ROLE_RANK",
                  "MASTER_ADDR", "MASTER_PORT", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # fmt: skip
"""A worker is a world of its own, and vLLM's sleep mode does not go with every setting of the allocator."""


def _environment(device: torch.device, temporary: str) -> dict[str, str]:
    """The environment of a worker: this process's, less its place among others, with its device alone to be seen."""
    environ = {name: value for name, value in os.environ.items()
               if name not in OF_THE_TRAINER and not name.startswith("TORCHELASTIC_")}  # fmt: skip
    environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    environ["TMPDIR"] = temporary  # what vLLM leaves there goes away with the worker, however that ends
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[index] if seen else str(index)
    return environ


def _new_log(folder: str) -> tuple[int, Path]:
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix="vllm-", suffix=".log", dir=folder)
    return descriptor, Path(name)


def _end(
    process: subprocess.Popen[bytes],
    connection: Connection[Any, Any],
    folder: tempfile.TemporaryDirectory[str],
    owner: int,
) -> None:
    """Lets a worker end by itself, or makes it; leaves no process behind and no temporary file."""
    if os.getpid() != owner:
        return  # a fork of the trainer: the worker is not its own
    connection.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    folder.cleanup()
