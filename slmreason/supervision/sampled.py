"""Candidates that the student samples with help, where nobody has rewritten a problem's solution for it.

Hand-overs with the least help that still ends right (arXiv 2506.17211), and rationalised solutions: the student writes
its own with the raw one before its eyes (STaR, arXiv 2203.14465). What is trained on has the plain question.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slmreason.records import BridgeCandidate, Problem, Provenance, Trace
from slmreason.rollout.engine import Completion, RolloutEngine, Sampling, prompt_limit
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import map_over_processes
from slmreason.student import Student
from slmreason.supervision.checks import SHOWN, shown_fault
from slmreason.supervision.handover import Handover, continuations, least_help, sampled
from slmreason.supervision.settings import BridgeSettings
from slmreason.supervision.templates import template

log = logging.getLogger(__name__)
Verify = Callable[[Problem, Trace], BridgeCandidate]


@dataclass(frozen=True)
class Draft:
    """A problem, and what there is for it so far."""

    problem: Problem
    solution: str
    """The raw one."""
    candidates: list[BridgeCandidate]
    """To which those that are sampled are added."""

    @property
    def is_served(self) -> bool:
        """Whether a candidate has passed that is not the raw trace."""
        return any(each.rejected is None and each.trace.provenance != "teacher" for each in self.candidates)

    @property
    def right(self) -> set[str]:
        """Candidates that end right, be they copies of the raw trace."""
        return {each.trace.text for each in self.candidates if each.rejected is None or each.rejected.kind in SHOWN}


class Draws:
    """Samples prompts as far as a budget of tokens goes."""

    def __init__(
        self,
        student: Student,
        engine: RolloutEngine,
        sampling: Sampling,
        tokens: int | None = None,
        watch: Watch | None = None,
        sync: bool = True,
    ) -> None:
        """
        Args:
            tokens: the budget; None for no limit.
            watch: counts the tokens as they are sampled.
            sync: false where the engine has the student's present weights already.
        """
        self.student, self.engine, self.sampling = student, engine, sampling
        self.tokens, self.watch = tokens, watch
        self.limit = prompt_limit(student, engine, sampling.max_new_tokens, f"{sampling.max_new_tokens} new tokens")
        self._engine_is_behind = sync
        self.spent = 0
        self.has_ended = False
        """Whether a prompt was left out for want of tokens."""
        self._completions: Counter[Provenance] = Counter()
        self._tokens: Counter[Provenance] = Counter()

    def may_go_on(self) -> bool:
        """Whether more may be begun."""
        if self.tokens is not None and self.spent >= self.tokens:
            self.has_ended = True
        return not self.has_ended

    def of(self, prompts: Sequence[tuple[int, ...]], samples: int, kind: Provenance) -> list[list[Completion]]:
        """`samples` completions of each prompt, in one batch if the budget surely holds them; none when it is spent.

        Args:
            kind: of what is written; completions of one kind are taken to be of about one length.
        """
        drawn: list[list[Completion]] = []
        while len(drawn) < len(prompts) and self.may_go_on():
            self._sync()
            batch = prompts[len(drawn) : len(drawn) + self._affordable(len(prompts), samples, kind)]
            groups = sampled(batch, self.student, self.engine, self.sampling, samples, self._progress)
            tokens = sum(len(completion.token_ids) for group in groups for completion in group)
            self.spent += tokens
            self._tokens[kind] += tokens
            self._completions[kind] += samples * len(batch)
            drawn += groups
        return drawn + [[] for _ in prompts[len(drawn) :]]

    def _sync(self) -> None:
        """Once: the student does not change between the draws."""
        if self._engine_is_behind:
            self.engine.sync(self.student)
            self._engine_is_behind = False

    def _affordable(self, prompts: int, samples: int, kind: Provenance) -> int:
        """Prompts that what is left is enough for, at the mean length so far; at first, at full length."""
        if self.tokens is None:
            return prompts
        seen = self._completions[kind]
        expected = self._tokens[kind] / seen if seen else self.sampling.max_new_tokens
        return max(1, int((self.tokens - self.spent) / (samples * expected)))

    def _progress(self, completions: int, tokens: int) -> None:
        if self.watch is not None:
            self.watch.advance(0, tokens)


class Sampler:
    """Samples candidates for problems that have no verified trace but the raw one, all of them side by side."""

    def __init__(self, student: Student, engine: RolloutEngine, verify: Verify, settings: BridgeSettings) -> None:
        """
        Args:
            verify: what every candidate must pass; a copy of the raw trace is rejected here besides.
        """
        self.student, self.engine, self.verify, self.settings = student, engine, verify, settings

    def add(self, drafts: Sequence[Draft], sampling: Sampling, watch: Watch | None = None) -> None:
        """Adds what is sampled to the candidates of each, passed or rejected.

        Args:
            sampling: whose seed and limit are taken; the temperature is `bridge.temperature`.
            watch: counts the tokens as they are sampled, and each problem when all are done.
        """
        each = self.settings.max_sampled_tokens
        warm = replace(sampling, temperature=self.settings.temperature)
        draws = Draws(self.student, self.engine, warm, None if each is None else each * len(drafts), watch)
        if self.settings.handover_search:
            self._search(_in_need(drafts), draws)
        if self.settings.rationalise:
            self._rationalise(_in_need(drafts), draws)
        if watch is not None:
            watch.advance(len(drafts), 0)
        if draws.has_ended:
            log.info("bridge: bridge.max_sampled_tokens, %s a problem, ended the sampling after %d tokens; %d of %d "
                     "problems have no verified trace but the raw one", each, draws.spent, len(_in_need(drafts)),
                     len(drafts))  # fmt: skip

    def _search(self, drafts: Sequence[Draft], draws: Draws) -> None:
        by_id = {draft.problem.id: draft for draft in drafts}

        def draw(prompts: list[tuple[int, ...]]) -> list[list[Completion]]:
            return draws.of(prompts, self.settings.handover_samples, "handover")

        def continue_from(handovers: list[Handover]) -> list[bool | None]:
            texts = continuations(handovers, self.student, draw, draws.limit)
            passed = self._add([by_id[each.problem.id] for each in handovers], texts, "handover")
            return [each or None for each in passed]

        least_help(
            problems=[draft.problem for draft in drafts],
            solutions=[draft.solution for draft in drafts],
            continue_from=continue_from,
            leave=2,  # what lacks the last step alone, which may only say the answer, would be a copy
            may_go_on=draws.may_go_on,
        )

    def _rationalise(self, drafts: Sequence[Draft], draws: Draws) -> None:
        prompts = [self._prompt(draft) for draft in drafts]
        fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= draws.limit.tokens]
        if len(fitting) < len(prompts):
            log.warning("bridge: %d of %d problems are not rationalised, the prompt with their solution is too long: "
                        "%s; lower bridge.max_trace_tokens", len(prompts) - len(fitting), len(prompts),
                        draws.limit.why)  # fmt: skip
        groups = draws.of([prompts[index] for index in fitting], self.settings.rationalise, "rationalised")
        texts = [
            [self.student.decode_completion(each.token_ids) for each in group if not each.truncated] for group in groups
        ]
        self._add([drafts[index] for index in fitting], texts, "rationalised")

    def _prompt(self, draft: Draft) -> tuple[int, ...]:
        """The question with the solution behind it, and the student's own instruction."""
        asked = template("rationalise").render(question=draft.problem.question, solution=draft.solution.strip())
        return self.student.chat.question(asked, draft.problem.turns)

    def _add(self, drafts: Sequence[Draft], texts: Sequence[Sequence[str]], kind: Provenance) -> list[bool]:
        """Verifies the texts of each and adds what is new; of each, whether one ended right, be it a copy."""
        new = []
        for draft, mine in zip(drafts, texts, strict=True):
            known = {candidate.trace.text for candidate in draft.candidates}
            new += [(draft, text) for text in dict.fromkeys(mine) if text.strip() and text not in known]

        def verified(share: list[tuple[Problem, str, str]]) -> list[BridgeCandidate]:
            return [self._verified(problem, solution, text, kind) for problem, solution, text in share]

        # Shared out, so that all processes go on with the same verdicts.
        found = map_over_processes(verified, [(draft.problem, draft.solution, text) for draft, text in new])
        for (draft, _), candidate in zip(new, found, strict=True):
            draft.candidates.append(candidate)
        return [not draft.right.isdisjoint(mine) for draft, mine in zip(drafts, texts, strict=True)]

    def _verified(self, problem: Problem, solution: str, text: str, kind: Provenance) -> BridgeCandidate:
        candidate = self.verify(problem, Trace(problem.id, text, kind))
        return replace(candidate, rejected=candidate.rejected or shown_fault(text, solution))


def _in_need(drafts: Sequence[Draft]) -> list[Draft]:
    return [draft for draft in drafts if not draft.is_served]
