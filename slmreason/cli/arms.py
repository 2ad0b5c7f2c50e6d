"""The runs of a comparison.

An arm is a small config overlay (`configs/arms/`), a run is `slmreason fit` in a process of its own with one arm and
one seed. Runs stand in `OUT/ARM/seed-N`; what is done is not done again, and what was cut off goes on where it was.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from jsonargparse import Namespace

from slmreason.cli.command import Request
from slmreason.cli.config import parse
from slmreason.cli.difference import differing_keys
from slmreason.cli.errors import ConfigError
from slmreason.cli.recipes import RECIPES
from slmreason.evaluate.compare import Outcome, read_outcome
from slmreason.run.folder import RunFolder

log = logging.getLogger(__name__)
ARMS = (
    "ours", "base", "sft_all", "distill_raw", "grpo_only", "sft_then_grpo", "raw_then_grpo", "random_routing",
    "ours_without_bridge", "ours_without_cft", "cft_mixed",
)  # fmt: skip
"""The packaged arms of a comparison that names none; the first of those that are run is compared with the others."""
RESCUE_ARMS = ("rescue_handover", "rescue_gate", "rescue_chord")
"""Packaged arms that are run where they are named: the method with an option of `grpo.rescue`."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path
    """Of all runs of the arm, and its config."""

    @property
    def run_dir(self) -> Path:
        return self.folder / f"seed-{self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / f"seed-{self.seed}.log"

    def outcome(self) -> Outcome | None:
        return read_outcome(self.run_dir, self.arm, self.seed)


def prepare_arm(request: Request, arm: str, folder: Path) -> Path:
    """Writes the config of an arm, and gives its folder.

    Raises:
        ConfigError: there is no such arm, its config is wrong, or differs from that of runs that are there already.
    """
    parser = request.parser
    config = parse(parser, [*request.args, f"--config={find_arm(arm)}"])
    path, now = folder / "config.yaml", parser.dump(config, skip_none=False)
    if path.exists() and (keys := differing_keys(yaml.safe_load(path.read_text()), yaml.safe_load(now))):
        raise ConfigError(f"{folder} has runs by another config; it differs in {', '.join(keys)}: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    parser.save(config, str(path), skip_none=False, overwrite=True)
    return folder


def find_arm(arm: str) -> Path:
    """The file of an arm: a packaged one by its name, or one of the user's.

    Raises:
        ConfigError: there is neither.
    """
    for path in (RECIPES / "arms" / f"{arm}.yaml", Path(arm)):
        if path.is_file():
            return path
    raise ConfigError(f"--arms: no arm {arm!r}; there are {', '.join(ARMS + RESCUE_ARMS)}, or the path of a YAML file")


def slots(config: Namespace) -> list[dict[str, str]]:
    """The environment of each run that goes on side by side: GPUs of its own, or a share of the cores."""
    count = 0 if config.trainer.accelerator == "cpu" else torch.cuda.device_count()
    devices = config.trainer.devices
    each = len(devices) if isinstance(devices, list) else max(1, int(devices)) if str(devices).isdigit() else 1
    jobs = config.jobs or max(1, count // each)
    if count:
        ids = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
        groups = [ids[start : start + each] for start in range(0, len(ids) - each + 1, each)] or [ids]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(groups[job % len(groups)])} for job in range(jobs)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    return [{"OMP_NUM_THREADS": threads} for _ in range(jobs)]


def work_through(runs: Sequence[Run], free: list[dict[str, str]]) -> list[tuple[Run, int]]:
    """Runs all, as many side by side as there are slots; gives those that failed with their status.

    Raises:
        ConfigError: a run found fault with the config or the data, which would be so for the others too.
    """
    waiting, failed = list(runs), []
    going: dict[subprocess.Popen[bytes], tuple[Run, dict[str, str], float]] = {}
    log.info("%d runs to do, %d side by side", len(runs), len(free))
    try:
        while waiting or going:
            while waiting and free:
                run, slot = waiting.pop(0), free.pop()
                going[start(run, slot)] = run, slot, time.monotonic()
            time.sleep(POLL_SECONDS)
            for process in [process for process in going if process.poll() is not None]:
                run, slot, began = going.pop(process)
                free.append(slot)
                if process.returncode == 2:
                    raise ConfigError(f"{run.arm}, seed {run.seed}: {last_error(run.log)}")
                outcome = run.outcome()
                if outcome is None:
                    failed.append((run, process.returncode))
                    continue
                log.info("%s, seed %d: %.1f %%, %.2f M tokens, %.0f s; %d to go", run.arm, run.seed, 100 * outcome.mean,
                         sum(outcome.tokens.values()) / 1e6, time.monotonic() - began,
                         len(waiting) + len(going))  # fmt: skip
    finally:
        for process in going:
            process.terminate()
        for process in going:
            process.wait()
    return failed


def start(run: Run, slot: dict[str, str]) -> subprocess.Popen[bytes]:
    """Begins a run, or goes on with it."""
    if run.run_dir.exists() and not RunFolder(run.run_dir).config.exists():
        shutil.rmtree(run.run_dir)  # was cut off before there was anything in it
    command = [
        sys.executable, "-m", "slmreason.cli", "fit", f"--config={run.folder / 'config.yaml'}",
        f"--seed_everything={run.seed}", f"--run_dir={run.run_dir}", "--resume=auto",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    with open(run.log, "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **slot})


def last_error(path: Path) -> str:
    """The message that a command ended with."""
    lines = path.read_text(errors="replace").splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[begins[-1] :]).removeprefix("error: ") if begins else f"failed, see {path}"
