"""What a run sets in PyTorch, and puts back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from slmreason.cli.config import build_parser, instantiate, parse
from slmreason.curriculum.trainer import Processes
from slmreason.runtime.backend import BackendSettings, applied

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def as_pytorch_has_it() -> Iterator[None]:
    before = state()
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.set_float32_matmul_precision(before[1])


def state() -> tuple[bool, str]:
    return torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()


def test_a_run_on_a_gpu_goes_without_cudnn_attention_and_with_tf32() -> None:
    with applied(BackendSettings(), CUDA):
        assert state() == (False, "high")
    assert state() == (True, "highest")


def test_one_key_each_puts_them_back() -> None:
    parser = build_parser("fit", "")
    config = parse(parser, ["--backend.cudnn_attention=true", "--backend.float32_matmul_precision=highest"])
    with applied(instantiate(parser, config).backend, CUDA):
        assert state() == (True, "highest")


def test_float32_on_a_cpu_stays_as_it_is() -> None:
    with applied(BackendSettings(), CPU):
        assert state() == (False, "highest")


def test_every_command_runs_within_the_settings_and_puts_them_back_when_it_fails() -> None:
    processes = Processes({"accelerator": "cpu", "devices": 1}, BackendSettings())
    assert processes.run(state) == (False, "highest")

    def fails() -> None:
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        processes.run(fails)
    assert state() == (True, "highest")
