"""vLLM in the trainer's process. What it changes there is in place while it works, and put back when it has done.

And the other way round: what Lightning changes for a training step (default dtype, autocast) is not seen by vLLM, which
is made for a process of its own.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from slmreason.rollout.engine import Completion, EngineError, Sampling
from slmreason.rollout.vllm.core import Core
from slmreason.rollout.vllm.options import Spec
from slmreason.rollout.vllm.placement import starting
from slmreason.runtime.redact import redact


@contextmanager
def plain_precision() -> Iterator[None]:
    """Within it new tensors are float32 and no autocast is on, as in a new process.

    Lightning's `bf16-true` changes the first around a training step, `bf16-mixed` the second: adapters that are folded
    there would be rounded, and vLLM's caches would have another precision.
    """
    trainers = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as off:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    off.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_default_dtype(trainers)


def free_unused_memory() -> None:
    """Gives back what PyTorch holds of the GPU for later use: another process, or vLLM's own allocator, needs it now.

    Without a GPU there is nothing to do.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class _Visit:
    """Within it, what vLLM changes in its process is in place; outside, nothing of it is to be seen.

    That is: environment variables, random number generators, the number of threads, functions of torch that vLLM
    replaces (on a CPU, `torch.set_num_threads` among them), the CUDA stream that is current, torch.distributed's group
    of one, and gc.freeze.
    """

    def __init__(self) -> None:
        self._environ = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
        self._replaced: list[tuple[Any, str, Any]] = []
        self._group: Any = None
        self._stream: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        environ, threads, frozen = dict(os.environ), torch.get_num_threads(), gc.get_freeze_count()
        before = [(owner, dict(vars(owner))) for owner in (sys, torch, torch.cuda, torch.accelerator, torch.Tensor)]
        os.environ.update(self._environ)
        trainers_stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        for owner, name, theirs in self._replaced:
            setattr(owner, name, theirs)
        _change_stream(trainers_stream, self._stream)
        trainers, dist.GroupMember.WORLD = dist.GroupMember.WORLD, self._group
        try:
            with isolate_rng(), plain_precision():
                yield
        finally:
            self._group, dist.GroupMember.WORLD = dist.GroupMember.WORLD, trainers
            self._replaced = [change for owner, ours in before for change in _restore(owner, ours)]
            self._environ = {name: value for name, value in os.environ.items() if environ.get(name) != value}
            for name in self._environ:
                os.environ.pop(name)
            os.environ.update(environ)
            torch.set_num_threads(threads)
            if torch.cuda.is_initialized():
                self._stream = torch.cuda.current_stream()
                _change_stream(self._stream, trainers_stream or torch.cuda.default_stream())
            if not frozen:
                gc.unfreeze()


def _change_stream(before: Any, after: Any) -> None:
    """Makes another CUDA stream the current one; what it is given to do waits for what the one before has to do."""
    if before is not None and after is not None:
        after.wait_stream(before)
        torch.cuda.set_stream(after)


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


VISIT = _Visit()
"""One for the process, as vLLM's own state is."""


class InProcess:
    """A core in the trainer's process."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec = spec
        self._folder = tempfile.TemporaryDirectory(prefix="slmreason-vllm-", ignore_cleanup_errors=True)
        free_unused_memory()
        try:
            with starting(spec, device), VISIT():
                self._core = Core(spec)
        except Exception as error:
            raise EngineError(redact(f"vLLM cannot start with {spec.model}: {error}")) from error
        self._end = weakref.finalize(self, _close_within, self._core, self._folder, os.getpid())

    @property
    def folder(self) -> Path:
        """See `Placement.folder`."""
        return Path(self._folder.name)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `Core.load`."""
        free_unused_memory()
        with VISIT():
            # A weight is the student's own, or good only until the next; vLLM keeps a layer's until it has them all.
            self._core.load((name, tensor.detach().clone()) for name, tensor in weights)

    def load_adapters(self, folder: str) -> str | None:
        """See `Core.load_adapters`."""
        free_unused_memory()
        with VISIT():
            return self._core.load_adapters(folder)

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, tick: Callable[[int, int], None]
    ) -> list[list[Completion]]:
        """See `Core.generate`."""
        free_unused_memory()
        with VISIT():
            return self._core.generate(prompts, group_size, sampling, tick)

    def close(self) -> None:
        """Ends vLLM."""
        self._end()


def _close_within(core: Core, folder: tempfile.TemporaryDirectory[str], owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of the trainer, such as a data loader
        with VISIT():
            core.close()
        folder.cleanup()
