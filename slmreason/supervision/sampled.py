"""Candidates that the student samples with help, where nobody has rewritten a problem's solution for it.

Hand-overs with the least help that still ends right (arXiv 2506.17211), and rationalised solutions: the student writes
its own with the raw one before its eyes (STaR, arXiv 2203.14465). What is trained on has the plain question.

A budget of tokens serves as many problems as it can before it makes any of them better: the most help is tried first,
where a continuation is short and mostly right; what it does not serve is rationalised; only then is less help tried.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from slmreason.records import BridgeCandidate, Problem, Provenance, Trace
from slmreason.rollout.engine import Completion, RolloutEngine, Sampling, prompt_limit
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import map_over_processes
from slmreason.student import Student
from slmreason.supervision.checks import SHOWN, shown_fault
from slmreason.supervision.handover import Handover, Search, continuations, one_round, sampled
from slmreason.supervision.settings import BridgeSettings
from slmreason.supervision.templates import template

log = logging.getLogger(__name__)
Verify = Callable[[Problem, Trace], BridgeCandidate]
T = TypeVar("T")


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


@dataclass(frozen=True)
class LeastHelp:
    """The hand-overs of a draft: the search for the least help that ends right."""

    draft: Draft
    search: Search[bool]


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

    def of(
        self, prompts: Sequence[tuple[int, ...]], samples: int, kind: Provenance, first: int = 0
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt, in one batch if the budget surely holds them; none when it is spent.

        Args:
            kind: of what is written; completions of one kind are taken to be of about one length.
            first: completions of these prompts that were drawn before; the next ones are drawn.
        """
        sampling = replace(self.sampling, first=self.sampling.first + first)
        drawn: list[list[Completion]] = []
        while len(drawn) < len(prompts) and self.may_go_on():
            self._sync()
            batch = prompts[len(drawn) : len(drawn) + self._affordable(len(prompts), samples, kind)]
            groups = sampled(batch, self.student, self.engine, sampling, samples, self._progress)
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
        searches = self._searches(_in_need(drafts))
        too_long: set[str] = set()
        self._try(_still_open(searches), draws, too_long)
        if self.settings.rationalise:
            self._rationalise(_in_need(drafts), draws)
        while (still_open := _still_open(searches)) and draws.may_go_on():
            self._try(still_open, draws, too_long)
        if watch is not None:
            watch.advance(len(drafts), 0)
        if too_long:
            log.warning("bridge: some hand-overs of %d of %d problems are not tried, the steps are too long: %s; "
                        "lower bridge.max_trace_tokens", len(too_long), len(searches), draws.limit.why)  # fmt: skip
        if draws.has_ended:
            log.info("bridge: bridge.max_sampled_tokens, %s a problem, ended the sampling after %d tokens; %d of %d "
                     "problems have no verified trace but the raw one", each, draws.spent, len(_in_need(drafts)),
                     len(drafts))  # fmt: skip

    def _searches(self, drafts: Sequence[Draft]) -> list[LeastHelp]:
        if not self.settings.handover_search:
            return []
        # What lacks the last step alone, which may only say the answer, would be a copy.
        return [LeastHelp(draft, Search(draft.problem, draft.solution, leave=2, most_first=True)) for draft in drafts]

    def _try(self, searches: Sequence[LeastHelp], draws: Draws, too_long: set[str]) -> None:
        """One number of steps of each: continued until a continuation ends right, `handover_samples` times at most.

        Args:
            too_long: IDs of problems that had a hand-over too long to be continued; more are added.
        """
        draft_of = {each.draft.problem.id: each.draft for each in searches}

        def attempt(handovers: list[Handover], first: int) -> list[bool]:
            def draw(prompts: list[tuple[int, ...]]) -> list[list[Completion]]:
                return draws.of(prompts, 1, "handover", first)

            texts = continuations(handovers, self.student, draw, draws.limit)
            too_long.update(each.problem.id for each, mine in zip(handovers, texts, strict=True) if mine is None)
            return self._add(
                [draft_of[each.problem.id] for each in handovers], [mine or [] for mine in texts], "handover"
            )

        def continue_from(handovers: list[Handover]) -> list[bool | None]:
            ended_right = one_by_one(handovers, attempt, self.settings.handover_samples, draws.may_go_on)
            return [each or None for each in ended_right]

        one_round([each.search for each in searches], continue_from)

    def _rationalise(self, drafts: Sequence[Draft], draws: Draws) -> None:
        """Shows each its raw solution until one of its own passes, `rationalise` times at most."""
        prompts = [self._prompt(draft) for draft in drafts]
        fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= draws.limit.tokens]
        if len(fitting) < len(prompts):
            log.warning("bridge: %d of %d problems are not rationalised, the prompt with their solution is too long: "
                        "%s; lower bridge.max_trace_tokens", len(prompts) - len(fitting), len(prompts),
                        draws.limit.why)  # fmt: skip

        def attempt(indices: list[int], first: int) -> list[bool]:
            groups = draws.of([prompts[index] for index in indices], 1, "rationalised", first)
            texts = [
                [self.student.decode_completion(each.token_ids) for each in group if not each.truncated]
                for group in groups
            ]
            tried = [drafts[index] for index in indices]
            self._add(tried, texts, "rationalised")
            return [draft.is_served for draft in tried]

        one_by_one(fitting, attempt, self.settings.rationalise, draws.may_go_on)

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


def _still_open(searches: Sequence[LeastHelp]) -> list[LeastHelp]:
    """Those that another try may serve, then those that one may serve with less help."""
    still_open = [each for each in searches if each.search.is_open and (each.search.found or not each.draft.is_served)]
    return sorted(still_open, key=lambda each: each.draft.is_served)


def one_by_one(
    items: Sequence[T],
    attempt: Callable[[list[T], int], Sequence[bool]],
    at_most: int,
    may_go_on: Callable[[], bool],
) -> list[bool]:
    """Tries each item until it has succeeded, in rounds of all that have not; of each, whether it has.

    Args:
        attempt: (items, rounds before this one) -> whether each has succeeded.
        at_most: rounds.
        may_go_on: asked before each round.
    """
    done = [False] * len(items)
    for number in range(at_most):
        left = [index for index, is_done in enumerate(done) if not is_done]
        if not left or not may_go_on():
            break
        for index, success in zip(left, attempt([items[index] for index in left], number), strict=True):
            done[index] = success
    return done
