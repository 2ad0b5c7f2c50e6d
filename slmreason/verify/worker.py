"""A process that compares expressions with math-verify: `python -m slmreason.verify.worker MEMORY_MB TIMEOUT_S`.

Reads lines of JSON `["answer", "gold"]`, says `equal`, `different` or `memory` to each, and ends with its input. It is
`slmreason.verify.pool` that keeps its time, so math-verify's own limits are off: they are signals, and a signal does
not end a long computation in C.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from functools import lru_cache
from itertools import product
from typing import Any

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

from slmreason.verify.answers import as_number


def same_expression(answer: str, gold: str) -> bool:
    """True when math-verify finds two expressions equal.

    Raises:
        MemoryError: the comparison needs more memory than there is.
    """
    number = as_number(gold)
    # It rounds to so many places behind the point; a small gold needs more of them to be told from zero.
    places = 6 - min(0, number.adjusted()) if number else 6
    # From a gold that it cannot read as a whole it would else pick out some number.
    pairs = product(_expressions(gold, whole=True), _expressions(answer, whole=False))
    return any(_equal(wanted, given, places) for wanted, given in pairs)


def _equal(wanted: Any, given: Any, places: int) -> bool:
    try:
        return bool(verify(wanted, given, float_rounding=places, timeout_seconds=None, raise_on_error=True))
    except MemoryError:  # one of the many errors that it would else answer with no
        raise
    except Exception:
        return False


@lru_cache(maxsize=1024)  # all rollouts of a problem share its gold answer
def _expressions(answer: str, whole: bool) -> list[Any]:
    latex = LatexExtractionConfig(boxed_match_priority=0)
    settings = [latex] if whole else [latex, ExprExtractionConfig()]
    return parse(f"${answer}$", settings, fallback_mode="no_fallback", parsing_timeout=None)


def _reply(answer: str, gold: str, most: float) -> str:
    """The ruling. Where memory ran short inside of math-verify it may say no, so a no above `most` MiB is none."""
    try:
        if same_expression(answer, gold):
            return "equal"
    except MemoryError:
        return "memory"
    except Exception:
        pass
    return "memory" if _peak_mb() > most else "different"


def main(memory_mb: int, timeout_s: float) -> None:
    """Answers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    _limit_memory(memory_mb)
    same_expression(r"\frac{1}{2}", "x")  # builds the parser's tables, which should not be on the first pair's time
    idle = _peak_mb()
    if idle >= memory_mb:  # it has that already: each comparison would fail
        sys.exit(f"memory_mb must be above {idle:.0f}, which is what a worker has before the first comparison")
    most = idle + (memory_mb - idle) / 2  # what failed for want of memory may have asked for as much again
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin.buffer:
        # Should the parent die in the meantime, nobody else would end a comparison that never does.
        signal.alarm(math.ceil(2 * timeout_s) + 1)
        answer, gold = json.loads(line)
        reply = _reply(answer, gold, most)
        signal.alarm(0)
        replies.write(f"{reply}\n")
        replies.flush()


def _limit_memory(memory_mb: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_mb * 2**20 if hard == resource.RLIM_INFINITY else min(memory_mb * 2**20, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ValueError, OSError):
        if sys.platform == "linux":  # elsewhere the kernel may not know this limit
            raise


def _peak_mb() -> float:
    """The most address space that this process ever had, in MiB; 0 where the kernel does not tell."""
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) / 1024 for line in file if line.startswith("VmPeak:")), 0.0)
    except OSError:
        return 0.0


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
