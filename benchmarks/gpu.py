"""What only a GPU can tell, in six minutes on one H100: is it right there, how fast is it, what does it take.

    python -m benchmarks.gpu --budget 330 --out benchmarks/results/gpu
    python -m benchmarks.gpu --device cpu --out FOLDER              (toy size: whether the script itself runs)

Each section runs by itself: one that fails is recorded, and the rest goes on; one that does not fit what is left of the
budget is skipped. `gpu.json` in the folder is written anew after each. It needs torch, transformers, lightning and
peft, and for the rows beside TRL trl and datasets; no network and no vLLM.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_sections import Lab, Section

FILE = "gpu.json"
PATIENCE = 3.0
"""A section is stopped after so many times its estimate, or at the end of the budget."""
LEAST_S = 30.0
"""No section is stopped sooner, the end of the budget aside."""
ROOM_BYTES = 4 << 30
"""For the random model and checkpoints."""
PATH = re.compile(r"(?<![\w.:/])(?:/[\w.+@~-]+){2,}/?")
"""Absolute paths in messages."""


class OutOfTime(BaseException):
    """A section took too long. No Exception, so that what catches those lets it through."""


def run_sections(
    sections: Sequence[Section], lab: Lab, budget: float, out: Path, began: float | None = None
) -> list[dict[str, Any]]:
    """Runs the sections in their order and writes what they found after each.

    Args:
        budget: seconds for all of them, since `began` (`time.monotonic`).

    Returns:
        A row for each section: name, verdict, figure, passes_when, seconds, figures.
    """
    deadline = (time.monotonic() if began is None else began) + budget
    about = described(lab)
    rows: list[dict[str, Any]] = []
    broken = ""
    for section in sections:
        write(out, {**about, "running": section.name, "sections": rows})
        left = deadline - time.monotonic()
        if broken:
            row = skipped(section, f"the device is in an error state since {broken}; run it with --sections")
        elif section.estimate(lab) > left:
            row = skipped(section, f"needs {section.estimate(lab):.0f} s, {max(0.0, left):.0f} s are left")
        else:
            row = one(section, lab, left)
            if row["verdict"] == "failed" and not usable(lab):
                broken = section.name
        rows.append(row)
        print(f"{section.name}: {row['verdict']}, {row['figure']} ({row['seconds']:.1f} s)", flush=True)
        write(out, {**about, "running": None, "sections": rows})
    return rows


def skipped(section: Section, reason: str) -> dict[str, Any]:
    return {"name": section.name, "verdict": "skipped", "figure": f"skipped: {reason}",
            "passes_when": section.passes_when, "seconds": 0.0, "figures": {}}  # fmt: skip


def one(section: Section, lab: Lab, left: float) -> dict[str, Any]:
    """Runs a section, whatever becomes of it."""
    import torch

    from benchmarks.gpu_sections import Skip

    row = skipped(section, "")
    torch.manual_seed(0)
    started = time.monotonic()
    try:
        with time_limit(min(left, max(LEAST_S, PATIENCE * section.seconds))):
            outcome = section.run(lab)
        verdict = "measured" if outcome.passed is None else "passed" if outcome.passed else "failed"
        row |= {"verdict": verdict, "figure": outcome.figure, "figures": outcome.figures}
    except Skip as reason:
        row |= {"figure": f"skipped: {reason}"}
    except (Exception, OutOfTime) as error:
        row |= {"verdict": "failed", "figure": without_paths(f"{type(error).__name__}: {error}")[:300],
                "error": frames(error)}  # fmt: skip
    row["seconds"] = time.monotonic() - started
    clean(lab)
    return row


def frames(error: BaseException) -> list[str]:
    """Where an error arose, the innermost last, by the files' names alone."""
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-8:]]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` within it after so many seconds, where the system has such a clock."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    began, before = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    theirs, _ = signal.setitimer(
        signal.ITIMER_REAL, max(0.1, seconds)
    )  # whoever else counts on it: a test's limit, say
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(0.1, theirs - (time.monotonic() - began)) if theirs else 0)
        signal.signal(signal.SIGALRM, before)


def clean(lab: Lab) -> None:
    """Leaves no memory, group of processes or setting behind for the next section."""
    import torch

    from slmreason.runtime.distributed import close

    torch.set_grad_enabled(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high" if lab.cuda else "highest")
    gc.collect()
    if usable(lab):
        close()
        if lab.cuda:
            torch.cuda.empty_cache()


def usable(lab: Lab) -> bool:
    """Whether the device still works: after a device assert every further call fails."""
    import torch

    try:
        if lab.cuda:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def described(lab: Lab) -> dict[str, Any]:
    """What a file says beside its sections: command, versions, machine, device, sizes."""
    from dataclasses import asdict

    from benchmarks.common import about
    from benchmarks.gpu_sections.machine import device_facts

    return {**about(), "device": device_facts(lab), "sizes": asdict(lab.sizes)}


def write(out: Path, result: dict[str, Any]) -> None:
    """Writes all that is known so far, whole or not at all. `running` names the section that comes next, for whoever
    finds the file of a process that died."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(tidied(result), indent=1) + "\n")
    temporary.replace(out / FILE)


def tidied(value: Any) -> Any:
    """The same without paths of this machine, numbers to six digits, and what is no number of JSON as text."""
    if isinstance(value, dict):
        return {str(key): tidied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [tidied(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else str(value)
    return without_paths(value) if isinstance(value, str) else value


def without_paths(text: str) -> str:
    """Of each absolute path its last part."""
    return PATH.sub(lambda found: Path(found.group()).name, text)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The sections in lines: section, figure, passes when, verdict, seconds."""
    head = ("section", "figure", "passes when", "verdict", "seconds")
    lines = [head, *((r["name"], r["figure"], r["passes_when"], r["verdict"], f"{r['seconds']:.1f}") for r in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(f"{text:<{w}}" for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def chosen(names: Sequence[str] | None, sections: Sequence[Section]) -> list[Section]:
    """The sections of these names, in their own order; all when none is given.

    Raises:
        ValueError: a name is of none.
    """
    known = [section.name for section in sections]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"--sections: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return [section for section in sections if names is None or section.name in names]


def in_memory() -> Path | None:
    """A folder of the machine's memory that has room for the random model; None where there is none."""
    memory = Path("/dev/shm")
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOM_BYTES
    return memory if has_room else None


def parsed() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=330, help="seconds for everything, imports included")
    parser.add_argument("--out", type=Path, help=f"folder for {FILE}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: everything at toy size")
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="only these (--list)")
    parser.add_argument("--list", action="store_true", help="print the sections with their estimates, and end")
    return parser, parser.parse_args()


def main() -> None:
    began = time.monotonic()
    parser, options = parsed()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # meters and trainers go by whether there is a CUDA device
    import torch

    from benchmarks.common import quiet
    from benchmarks.gpu_sections import SECTIONS, Lab

    try:
        sections = chosen(options.sections, SECTIONS)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for section in sections:
            print(f"{section.name:<12} {section.seconds:>4.0f} s  passes when: {section.passes_when}")
        print(f"{'all':<12} {sum(section.seconds for section in sections):>4.0f} s, on one H100")
        return
    if options.out is None:
        parser.error("--out FOLDER is needed")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here (--device cpu tries the script at toy size)")
    quiet()
    with tempfile.TemporaryDirectory(dir=in_memory(), prefix="benchmarks-gpu-") as scratch:
        lab = Lab(options.device, Path(scratch))
        clean(lab)
        rows = run_sections(sections, lab, options.budget, options.out, began)
    print(f"\nPython {platform.python_version()}, torch {torch.__version__}, {options.device}\n{table(rows)}")
    failed = sum(row["verdict"] == "failed" for row in rows)
    print(f"\n{len(rows)} sections, {failed} failed, {time.monotonic() - began:.0f} s; {options.out / FILE}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
