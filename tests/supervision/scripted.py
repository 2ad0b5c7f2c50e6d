"""An engine whose student says what a script says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slmreason.rollout.engine import Completion, Progress, RolloutEngine, Sampling
from slmreason.student import Student

Script = Callable[[str, int], str]
"""(text of the prompt, number of the sample) -> what is said; nothing is said for ever."""


class ScriptedEngine(RolloutEngine):
    """Notes each call of `generate` as (texts of its prompts, samples, sampling)."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.calls: list[tuple[list[str], int, Sampling]] = []

    def sync(self, student: Student) -> None:
        """Nothing to do."""

    def generate(
        self,
        student: Student,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        texts = [str(student.tokenizer.decode(list(prompt))) for prompt in prompts]
        self.calls.append((texts, group_size, sampling))
        groups = [[self._said(student, text, number, sampling) for number in range(group_size)] for text in texts]
        if progress is not None:
            said = [completion for group in groups for completion in group]
            progress(len(said), sum(len(completion.token_ids) for completion in said))
        return groups

    def _said(self, student: Student, prompt: str, number: int, sampling: Sampling) -> Completion:
        said = self.script(prompt, number)
        ids = student.encode_target(said) if said else (0,) * sampling.max_new_tokens
        return Completion(ids, (), truncated=not said)
