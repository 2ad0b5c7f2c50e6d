"""A process that scores answers with reasoning-gym: `python -m slmreason.verify.gym_worker MEMORY_MB`.

As `slmreason.verify.process_worker`, but for what it is asked (a problem's id, the digest of its question, an answer)
and what it says: `score 0.5`, or `other problem` where the id makes another question than it did.
"""

from __future__ import annotations

import contextlib
import sys

from slmreason.verify.gym import score
from slmreason.verify.process_worker import serve


def reply(identifier: str, question: str, answer: str) -> str:
    """The score as a line."""
    found = score(identifier, question, answer)
    return "other problem" if found is None else f"score {min(1.0, max(0.0, found))!r}"


def warm_up() -> None:
    """Imports the generators, which should not be on the first answer's time."""
    with contextlib.suppress(ImportError):  # said with the first problem
        import reasoning_gym  # noqa: F401


if __name__ == "__main__":
    warm_up()  # before memory is limited: what an idle process has is no answer's fault
    serve(int(sys.argv[1]), reply, warm_up)
