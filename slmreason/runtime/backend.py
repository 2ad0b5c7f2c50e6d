"""How PyTorch computes on a CUDA device for as long as a run lasts: settings of its process that a run puts back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass
class BackendSettings:
    """Kernels on CUDA devices. On a CPU nothing changes."""

    cudnn_attention: bool = False
    """Let attention (sdpa) take cuDNN's kernels, which PyTorch prefers on Hopper. They build a plan for each new shape,
    20 to 40 ms a plan, and packed micro-batches and decoding steps nearly always have a new one. Wrong tokens and NaN
    gradients have been reported of them."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "high"
    """Of products of float32 matrices, as `torch.set_float32_matmul_precision` takes it. `high` is TF32: 10 bits of
    mantissa at several times the speed. `highest` is plain float32."""


@contextmanager
def applied(settings: BackendSettings, device: torch.device) -> Iterator[None]:
    """Within it the settings hold, if the device is a CUDA one; afterwards those from before do."""
    attention, precision = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    torch.backends.cuda.enable_cudnn_sdp(settings.cudnn_attention)  # says nothing to other devices
    if device.type == "cuda":  # this says something to a CPU too
        torch.set_float32_matmul_precision(settings.float32_matmul_precision)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(attention)
        torch.set_float32_matmul_precision(precision)
