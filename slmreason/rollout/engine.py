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
    with_log_probs: bool = True
    """False where nobody reads `Completion.log_probs`: an engine may then leave them out."""
    first: int = 0
    """Completions of each prompt that were drawn before with this seed: the next ones are drawn, the same as if all
    were drawn at once."""


@dataclass(frozen=True)
class Completion:
    """Sampled tokens, each with its log-probability under the whole distribution, not normalised to a nucleus."""

    token_ids: tuple[int, ...]
    """The end-of-sequence token included, when there is one."""
    log_probs: tuple[float, ...]
    """One for each token, or none at all where they were not asked for. They are of the whole distribution at the
    sampling temperature (of temperature 1 where that is 0): a nucleus (`top_p`) says which tokens can be drawn, and the
    log-probs are not normalised to it, so that the trainer's, which knows no nucleus, are the same number."""
    truncated: bool
    """True when the token limit was reached before an end-of-sequence token."""


Progress = Callable[[int, int], None]
"""Takes (completions that have ended, tokens that were sampled) since the last call."""


class EngineError(RuntimeError):
    """The rollout engine cannot be started, died, hangs, or did not take the weights."""


class RolloutEngine(ABC):
    """Samples completions from the student."""

    exact: bool = True
    """True when a float32 student's log-probs here are the trainer's own numbers. False turns on importance correction
    in GRPO; in half precision, where they differ in any engine, it is always on."""
    length_key: str = "rollout"
    """The config key that sets `max_length`, for messages."""

    def max_length(self, student: Student) -> int | None:
        """Longest prompt with its completion, in tokens; None where the student alone bounds it."""
        return None

    def batch_size(self, student: Student) -> int:
        """Completions that should be asked for at a time: enough to keep it busy, few enough to lose.

        A run notes what it has sampled after each such batch.
        """
        return 1024

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

        What is drawn for a prompt depends on its tokens, `sampling.seed` and `sampling.first` alone, not on what else
        is in the batch or which process draws it (`prompt_seed`).

        Args:
            prompts: token ids of each prompt, none empty; there may be none, in one of several processes.
            progress: called now and then while completions are sampled.
        """

    def check(self, student: Student) -> None:  # noqa: B027 - an engine may have nothing to check
        """Makes sure that the engine can sample from a student, before anything else is done.

        Raises:
            ValueError: it cannot; the message says why.
        """

    @abstractmethod
    def sync(self, student: Student) -> None:
        """Gives the engine the student's present weights; called before it samples when they may have changed."""


@dataclass(frozen=True)
class PromptLimit:
    """The longest prompt that may be sampled from, in tokens, and what sets that."""

    tokens: int
    why: str


def prompt_limit(student: Student, engine: RolloutEngine, max_new_tokens: int, key: str) -> PromptLimit:
    """The longest prompt that leaves room for its completion in the student and in the engine.

    Args:
        key: the config key of `max_new_tokens`, for the message.
    """
    length, what = student.max_length, f"the student's {student.max_length} positions"
    engines = engine.max_length(student)
    if engines is not None and engines < length:
        length, what = engines, f"{engine.length_key} = {engines}"
    tokens = length - max_new_tokens
    return PromptLimit(tokens, f"{what} less {key} leave {tokens}")


def prompt_seed(sampling: Sampling, prompt: Sequence[int]) -> int:
    """The seed of a prompt's completions, wherever it stands and whoever samples it. 63 bits."""
    return stable_seed(sampling.seed, *prompt)


def stable_seed(*key: object) -> int:
    """A seed that depends on the key alone: the same in every process and on every machine. 63 bits."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
