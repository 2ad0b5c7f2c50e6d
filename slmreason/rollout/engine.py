"""The protocol behind which completions are sampled, so that a faster engine is another class in the config."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slmreason.student import Student


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """Sampled tokens, each with its log-probability under the whole distribution, not normalised to a nucleus."""

    token_ids: tuple[int, ...]
    """The end-of-sequence token included, when there is one."""
    log_probs: tuple[float, ...]
    truncated: bool
    """True when the token limit was reached before an end-of-sequence token."""


Progress = Callable[[int], None]


class RolloutEngine(ABC):
    """Samples completions from the student."""

    exact: bool = True
    """True when sampler log-probs are the trainer's own numbers; False turns on importance correction in GRPO."""

    @abstractmethod
    def generate(
        self,
        student: Student,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """`group_size` completions of each prompt, in the order of the prompts.

        What is drawn for a prompt depends on its tokens and `sampling.seed` alone, not on what else is in the batch or
        which process draws it (`prompt_seed`).

        Args:
            prompts: token ids of each prompt, none empty; there may be none, in one of several processes.
            progress: called with the number of prompts finished since the last call.
        """

    def check(self, student: Student) -> None:  # noqa: B027 - an engine may have nothing to check
        """Makes sure that the engine can sample from a student, before anything else is done.

        Raises:
            ValueError: it cannot; the message says why.
        """

    @abstractmethod
    def sync(self, student: Student) -> None:
        """Gives the engine the student's present weights; called after each optimizer step and before a probe."""


def prompt_seed(sampling: Sampling, prompt: Sequence[int]) -> int:
    """The seed of a prompt's completions, wherever it stands and whoever samples it. 63 bits."""
    return stable_seed(sampling.seed, *prompt)


def stable_seed(*key: object) -> int:
    """A seed that depends on the key alone: the same in every process and on every machine. 63 bits."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
