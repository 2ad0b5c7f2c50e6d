"""The worker process's side: a core, served over a socket.

Messages are JSON: what one side says is data to the other, and can never be code. The trainer sends the spec, then
["load" | "load_adapters" | "generate", arguments]; the worker answers with any number of
["tick", [completions, tokens]] and one ["done", result] or ["failed", message]. While it loads, the trainer sends a
list of [name, dtype, shape, offset] for each filling of the shared buffer, answered by ["tick", [0, 0]], and null at
the end.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from slmreason.rollout.engine import Completion, Sampling
from slmreason.rollout.vllm.core import Core
from slmreason.rollout.vllm.options import Spec, VLLMOptions

HEARTBEAT_S = 1.0
"""A worker that is alive says so at least this often while it samples."""
ALIGNMENT = 64
"""Bytes; where each tensor begins in the shared buffer."""
Entry = tuple[str, str, tuple[int, ...], int]


def send(connection: Connection[Any, Any], message: object) -> None:
    """Sends a message; records in it become objects with their fields."""
    connection.send_bytes(json.dumps(message, default=vars).encode())


def receive(connection: Connection[Any, Any]) -> Any:
    """Waits for the other side's next message, in which records and tuples are objects and lists.

    Raises:
        EOFError: the other side is gone.
    """
    return json.loads(connection.recv_bytes())


def view(buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    """The tensor that lies at `offset` bytes in a buffer. [bytes], uint8 -> shape, dtype."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    return buffer[offset : offset + size].view(dtype).view(shape)


def shared(descriptor: int, size: int) -> Tensor:
    """The memory behind a file descriptor, as both processes see it. [size], uint8."""
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def spec_of(fields: dict[str, Any]) -> Spec:
    """The spec that was sent."""
    options = VLLMOptions(**fields["options"])
    return Spec(**{**fields, "eos_ids": tuple(fields["eos_ids"]), "options": options})


def completions_of(groups: list[list[dict[str, Any]]]) -> list[list[Completion]]:
    """The completions that were sent."""
    return [
        [Completion(tuple(c["token_ids"]), tuple(c["log_probs"]), c["truncated"]) for c in group] for group in groups
    ]


def main(connection_fd: str, buffer_fd: str, size: str, folder: str) -> None:
    """The worker's life: build, then serve until the trainer closes the connection or is gone.

    Args:
        folder: of temporary files; a trainer that is gone cannot remove it.
    """
    connection: Connection[Any, Any] = Connection(int(connection_fd))
    buffer, trainer = shared(int(buffer_fd), int(size)), os.getppid()
    try:
        core = Core(spec_of(receive(connection)))
        send(connection, ("done", None))
        while True:
            _serve(core, _next(connection, trainer), connection, buffer)
    except (EOFError, ConnectionError):
        status = 0  # the trainer is done with this worker
        shutil.rmtree(folder, ignore_errors=True)
    except Exception as error:
        traceback.print_exc()
        send(connection, ("failed", f"{type(error).__name__}: {error}"))
        status = 1
    # At once: vLLM holds nothing that the end of its process and of its temporary folder would not free.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _next(connection: Connection[Any, Any], trainer: int) -> Any:
    """The next request. A connection can outlive the trainer in its data loaders, hence the look at the parent."""
    while not connection.poll(HEARTBEAT_S):
        if os.getppid() != trainer:
            raise EOFError
    return receive(connection)


def _serve(core: Core, request: tuple[str, Sequence[Any]], connection: Connection[Any, Any], buffer: Tensor) -> None:
    kind, arguments = request
    if kind == "load":
        core.load(_incoming(connection, buffer))
        send(connection, ("done", None))
    elif kind == "load_adapters":
        send(connection, ("done", core.load_adapters(*arguments)))
    else:
        prompts, group_size, sampling = arguments
        groups = core.generate(prompts, group_size, Sampling(**sampling), _heart(connection))
        send(connection, ("done", groups))


def _incoming(connection: Connection[Any, Any], buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
    while True:
        entries: list[Entry] | None = receive(connection)
        if entries is None:
            return
        for name, dtype, shape, offset in entries:
            yield name, view(buffer, getattr(torch, dtype), tuple(shape), offset).clone()
        send(connection, ("tick", (0, 0)))


def _heart(connection: Connection[Any, Any]) -> Callable[[int, int], None]:
    last = time.monotonic()

    def beat(completions: int, tokens: int) -> None:
        nonlocal last
        if completions or time.monotonic() - last > HEARTBEAT_S:
            last = time.monotonic()
            send(connection, ("tick", (completions, tokens)))

    return beat
