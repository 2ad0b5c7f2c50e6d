"""What Lightning has no public way to change. Seen in Lightning 2.6.6."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers import subprocess_script


@contextmanager
def patient_observer(patience_s: float) -> Iterator[None]:
    """Within it, a launcher gives the first process some time to end by itself once another one has failed.

    Lightning's own observer kills it at its next look, up to five seconds later: in the middle of saying what became of
    the run, or of giving back what it holds, on a busy machine.
    """

    class Patient(_ChildProcessObserver):
        def _terminate_all(self) -> None:
            time.sleep(patience_s)  # it is a daemon: where the process ends, so does this
            super()._terminate_all()

    def launch(child_processes: list[subprocess.Popen[Any]]) -> None:
        Patient(main_pid=os.getpid(), child_processes=child_processes).start()

    launchers: Any = subprocess_script
    plain = launchers._launch_process_observer
    launchers._launch_process_observer = launch
    try:
        yield
    finally:
        launchers._launch_process_observer = plain
