"""Signals in processes of their own: what ends a process whose main thread does not hear them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from slmreason.curriculum.trainer import end_processes
from tests.runs import ROOT

# A lock that is taken twice: the main thread waits in C for good, as it does in a CUDA synchronisation.
STUCK = """
import ctypes, threading
lock = ctypes.create_string_buffer(64)
libc = ctypes.CDLL(None)
threading.Timer(1.0, print, ["ready"], {"flush": True}).start()
libc.pthread_mutex_lock(lock)
libc.pthread_mutex_lock(lock)
"""
SHORT = """
from slmreason.runtime import preemption
preemption.GRACE_SECONDS, preemption.LAST_SECONDS = {grace}, 0.2
preemption.listen()
"""


def start(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_stuck_process_ends_some_time_after_a_first_signal() -> None:
    process = start(SHORT.format(grace=0.5) + STUCK)
    process.terminate()
    assert process.wait(30) == 143
    assert process.stderr is not None
    assert f"process {process.pid} did not end after signal 15" in process.stderr.read()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_stuck_process_ends_at_a_second_signal(first: signal.Signals) -> None:
    process = start(SHORT.format(grace=1000) + STUCK)
    process.send_signal(first)
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(30) == 143


def test_a_process_that_hears_is_not_ended_hard() -> None:
    works = """
    import time
    try:
        # Within the block: a signal may come before the next statement runs.
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("closed", flush=True)
    """
    process = start(SHORT.format(grace=1000) + textwrap.dedent(works))
    process.terminate()
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (143, "closed\n", "")


def test_a_signal_to_a_fork_does_not_end_its_parent() -> None:
    forks = """
    import os, signal, sys, time
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print("ready", flush=True)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    time.sleep(1.5)
    sys.exit(7 if status == 143 else 8)
    """
    process = start(SHORT.format(grace=0.2) + textwrap.dedent(forks))
    assert process.wait(30) == 7


def test_processes_that_do_not_end_are_killed(caplog: pytest.LogCaptureFixture) -> None:
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + STUCK
    hears = "import time\nprint('ready', flush=True)\ntime.sleep(60)"
    gone = "print('ready', flush=True)"
    processes = [start(code) for code in (deaf, hears, gone)]
    processes[2].wait(30)
    end_processes(processes, patience_s=0.5)
    assert [process.returncode for process in processes] == [-signal.SIGKILL, -signal.SIGTERM, 0]
    assert f"process {processes[0].pid} did not end within 0.5 s of SIGTERM: killed" in caplog.text


@pytest.mark.long
@pytest.mark.slow
def test_the_others_wait_longer_for_a_slow_first_process_than_their_group_would(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import time
        from datetime import timedelta
        import torch
        import torch.distributed as dist
        from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
        from slmreason.runtime.distributed import first_only, gather, rank
        from slmreason.curriculum.trainer import Processes

        def ask():
            time.sleep(20)
            return "what a teacher said"

        def job():
            sys.stdout.write(f"heard {rank()} {first_only(ask)} {gather([rank()])}\\n")
            sys.stdout.flush()
            if rank() == 0:
                time.sleep(20)
                return
            try:
                dist.all_reduce(torch.zeros(1))
            except RuntimeError:
                print("the first group keeps the user's timeout", flush=True)

        strategy = DDPStrategy(timeout=timedelta(seconds=15))
        Processes({"accelerator": "cpu", "devices": 2, "strategy": strategy}).run(job)
    """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )  # fmt: skip
    assert "heard 0 what a teacher said [0, 1]" in done.stdout, done.stdout[-3000:]
    assert "heard 1 what a teacher said [0, 1]" in done.stdout
    assert "the first group keeps the user's timeout" in done.stdout


@pytest.mark.long
def test_the_first_process_has_time_to_end_when_another_has_failed() -> None:
    """Lightning's observer looks every five seconds; what the first process says at its end must not be cut off."""
    works = """
    import subprocess, sys, time
    from lightning.pytorch.strategies.launchers import subprocess_script
    from slmreason.runtime.lightning_internals import patient_observer
    plain = subprocess_script._launch_process_observer
    with patient_observer({patience}):
        subprocess_script._launch_process_observer([subprocess.Popen([sys.executable, "-c", "raise SystemExit(143)"])])
    assert subprocess_script._launch_process_observer is plain
    print("ready", flush=True)
    time.sleep(8)
    print("ended", flush=True)
    """
    told = {}
    for patience in (60, 0):
        process = start(textwrap.dedent(works.format(patience=patience)))
        told[patience] = (process.communicate(timeout=60)[0], process.returncode)
    assert told == {60: ("ended\n", 0), 0: ("", -signal.SIGKILL)}
