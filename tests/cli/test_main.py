"""The command line before any command: help at once, and a name that is none."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from slmreason.cli import COMMANDS, main


def help_without_torch() -> subprocess.CompletedProcess[str]:
    code = "import sys; from slmreason.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_answers_without_torch() -> None:
    done = help_without_torch()
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.timing
def test_help_answers_at_once() -> None:
    started = time.perf_counter()
    help_without_torch()
    assert time.perf_counter() - started < 2


def test_unknown_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    shown = capsys.readouterr().err
    assert all(command in shown for command in COMMANDS)
