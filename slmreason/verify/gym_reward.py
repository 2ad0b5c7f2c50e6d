"""reasoning-gym's own scorers as the verifier, in processes that can be killed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from slmreason.records import Problem, Reject
from slmreason.verify.extract import final_answer, without_thoughts
from slmreason.verify.gym import digest, is_scorable
from slmreason.verify.notation import last_boxed
from slmreason.verify.process_pool import Limits, Ruling, shared_pool
from slmreason.verify.rewards import MAX_SHOWN_CHARS, RewardFn, Verdict

WORKER = "slmreason.verify.gym_worker"
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|mathrm)\s*\{([^{}]*)\}")


class GymReward(RewardFn):
    """What the problem's own generator gives an answer, from 0 to 1; only a full score is right.

    The answer is what stands in the last `<answer>` tag, else in the last box, else what is announced as the answer.
    """

    wants_finished_answer = True

    def __init__(
        self, workers: int | None = None, timeout_s: float = 10.0, memory_mb: int = 2048, budget_s: float = 60.0
    ) -> None:
        """
        Args:
            workers: Processes that score answers; null takes one for each core, at most four.
            timeout_s: Seconds of processor time a score may take, with the making of the problem again that it begins
                with; then its process is killed and the answer is wrong.
            memory_mb: MiB of address space a process may have.
            budget_s: Seconds that all completions graded together may lose to scores that never came.

        Raises:
            ValueError: a limit is not positive.
        """
        self.limits = Limits(workers, timeout_s, memory_mb, budget_s)
        self._rejects: list[Reject] = []

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return GymReward.grade(self, [(problem, text)])[0]

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        answers = [stated(text) for _, text in pairs]
        asked = [(problem.id, digest(problem.question), answer or "") for (problem, _), answer in
                 zip(pairs, answers, strict=True)]  # fmt: skip
        wanted = [
            each for each, answer in zip(asked, answers, strict=True) if answer is not None and is_scorable(answer)
        ]
        rulings = dict(zip(wanted, shared_pool(self.limits, WORKER).compare(wanted), strict=True)) if wanted else {}
        return [self._verdict(each, rulings.get(each)) for each in asked]

    def drain_rejects(self) -> list[Reject]:
        rejects, self._rejects = self._rejects, []
        return rejects

    def _verdict(self, asked: tuple[str, str, str], ruling: Ruling | None) -> Verdict:
        if ruling is None:
            return Verdict(0.0, False)
        identifier, _, answer = asked
        if ruling.limit:
            self._rejects.append(Reject(identifier, "verifier", ruling.limit, {"answer": answer[:MAX_SHOWN_CHARS]}))
        return Verdict(ruling.score, ruling.correct)


def stated(text: str) -> str | None:
    """What a completion gives as its answer, line ends and all: many of these answers are grids."""
    behind = without_thoughts(text)
    if tags := _TAG.findall(behind):
        return str(tags[-1]).strip()
    if (boxed := last_boxed(behind)) is not None:
        return _TEXT.sub(lambda match: match[1], boxed).strip()
    return final_answer(behind, words=True)
