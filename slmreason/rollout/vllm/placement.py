"""Where a vLLM runs: in the trainer's process (`InProcess`) or in one beside it (`Worker`). Both are asked alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from slmreason.rollout.engine import Completion, Sampling
from slmreason.rollout.vllm.options import Spec

log = logging.getLogger(__name__)


class Placement(Protocol):
    """A running vLLM, which began when this was made and ends when it is closed."""

    spec: Spec

    @property
    def folder(self) -> Path:
        """For files that vLLM reads; it goes with this."""

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `Core.load`. A tensor needs to be good only until the next."""

    def load_adapters(self, folder: str) -> str | None:
        """See `Core.load_adapters`."""

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, tick: Callable[[int, int], None]
    ) -> list[list[Completion]]:
        """See `Core.generate`."""

    def close(self) -> None:
        """Ends vLLM and frees what it holds. A second time it does nothing."""


@contextmanager
def starting(spec: Spec, device: torch.device) -> Iterator[None]:
    """Says that vLLM starts, and what that waits for; and afterwards how long it took."""
    if device.type != "cuda":
        wait = "which takes about ten seconds on a CPU"
    elif spec.options.enforce_eager:
        wait = "which takes about half a minute"
    else:
        wait = (
            "compiles the model and records CUDA graphs: one to three minutes the first time, less from vLLM's cache "
            f"({spec.options.section}.enforce_eager true does without, and samples slower)"
        )
    log.info("vLLM starts with %s, %s", spec.model, wait)
    began = time.monotonic()
    yield
    log.info("vLLM is ready after %.0f s", time.monotonic() - began)
