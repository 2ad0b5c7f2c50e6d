"""The Bridge: a hard problem's raw teacher trace becomes supervision that this student can learn.

Propose candidates, verify each, select the most learnable by rank-surprisal ratio. All candidates of all problems are
proposed with one call a kind, continued in one batched generate, and scored in packed batches without gradient. Where
no teacher rewrites, the student itself is sampled for more, with the raw trace as its help (`sampled`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from slmreason.records import BridgeCandidate, BridgeResult, Exemplar, Fault, Problem, Provenance, Trace
from slmreason.rollout.engine import RolloutEngine, Sampling
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import map_over_processes
from slmreason.student import Student
from slmreason.supervision.checks import BY_HEART, NOT_USABLE, TOO_LONG, trace_fault
from slmreason.supervision.handover import Handover, first_steps, hand_over
from slmreason.supervision.learnability import score_traces
from slmreason.supervision.sampled import Draft, Sampler
from slmreason.supervision.settings import BridgeSettings
from slmreason.supervision.written import count_written
from slmreason.teacher.base import Teacher
from slmreason.teacher.dataset import dataset_solution
from slmreason.verify.rewards import RewardFn


@dataclass(frozen=True)
class Material:
    """What there is to propose from, beside the teacher and the dataset's solutions."""

    exemplars: Sequence[Exemplar] = ()
    """Right solutions of the student itself, shown to the teacher as style."""
    traces: Sequence[Trace] = ()
    """Further candidates: the student's own right solutions, the new traces of the critique round before."""
    written: Sequence[Trace] = ()
    """What the teacher wrote in earlier rounds. The student has changed since and the teacher has not, so the teacher
    is not asked, and paid, again."""


@dataclass
class Proposals:
    """What is proposed for one problem."""

    problem: Problem
    solution: str | None
    """That came with the problem; None where there is none, it cannot be used, or the teacher gives it."""
    unusable: BridgeCandidate | None = None
    """The solution that came with the problem and cannot be used, which is said."""
    raw: str | None = None
    """The teacher's solution, else that which came with the problem."""
    rewritten: str | None = None
    """The teacher's rewrite of the raw one."""
    traces: list[Trace] = field(default_factory=list)
    """The candidates so far, each text once."""

    def add(self, text: str | None, provenance: Provenance) -> None:
        if text and all(text != trace.text for trace in self.traces):
            self.traces.append(Trace(self.problem.id, text, provenance))


class Bridge:
    """Proposes, verifies and selects a trace for each problem."""

    def __init__(
        self,
        student: Student,
        engine: RolloutEngine,
        teacher: Teacher,
        reward: RewardFn,
        settings: BridgeSettings,
        token_budget: int = 8192,
    ) -> None:
        """
        Args:
            token_budget: tokens of a batch in which traces are scored.
        """
        self.student, self.engine, self.teacher, self.reward = student, engine, teacher, reward
        self.settings, self.token_budget = settings, token_budget
        self.sampler = Sampler(student, engine, self.verify, settings)

    def raw(self) -> Bridge:
        """The same for problems that are not bridged: their raw trace is verified, and nothing else is proposed."""
        # Without a choice there is nothing that the raw trace could come last behind.
        settings = replace(self.settings, select=False, raw="compared")
        return Bridge(self.student, self.engine, self.teacher, self.reward, settings, self.token_budget)

    def make(
        self,
        problems: Sequence[Problem],
        sampling: Sampling,
        material: Material = Material(),  # noqa: B008 - frozen
        watch: Watch | None = None,
    ) -> list[BridgeResult]:
        """A trace for each problem, or none, with all that was proposed.

        The solution that came with a problem is always among the candidates, whoever the teacher is.

        Args:
            sampling: how the student continues a hand-over; what is sampled for has its own temperature.
            watch: counts hand-overs while they are sampled, one a problem.
        """
        proposals = [self._begin(problem) for problem in problems]
        self.propose(proposals, sampling, material, watch)
        # Shared out, so that all processes go on with the same verdicts.
        candidates = map_over_processes(lambda share: [self._candidates(each) for each in share], proposals)
        if self.settings.samples:
            self.sampler.add(_drafts(proposals, candidates), sampling, watch)
        self._score(problems, candidates)
        return [self.select(problem, mine) for problem, mine in zip(problems, candidates, strict=True)]

    def reverified(self, problem: Problem, trace: Trace) -> BridgeResult:
        """A trace that was chosen before, and perhaps edited since: verified again, with no other beside it."""
        candidate = self.verify(problem, trace)
        return BridgeResult(problem, (candidate,), None if candidate.rejected else trace)

    # -- propose ----------------------------------------------------------------------------------------------------

    def propose(
        self, proposals: Sequence[Proposals], sampling: Sampling, material: Material, watch: Watch | None = None
    ) -> None:
        """Adds candidates to each: raw, rewritten, those of the material, handed over (where none is searched for)."""
        # The teacher is asked again where all that is known is the solution that came with the problem.
        came = {(each.problem.id, each.solution) for each in proposals}
        written = [trace for trace in material.written if (trace.problem_id, trace.text) not in came]
        self._ask_for_solutions(proposals, written)
        if not self.settings.select:
            self._add_others([each for each in proposals if not each.raw], material.traces)
            return
        with_raw = [each for each in proposals if each.raw]
        self._ask_for_rewrites(with_raw, written, material.exemplars)
        self._add_others(proposals, material.traces)
        if self.settings.handover and not self.settings.handover_search:
            self._hand_over(with_raw, sampling, watch)

    def _begin(self, problem: Problem) -> Proposals:
        if self.teacher.has_dataset_solutions:
            return Proposals(problem, None)
        try:
            return Proposals(problem, dataset_solution(problem))
        except ValueError as error:
            trace = Trace(problem.id, problem.trace or "", "teacher")
            return Proposals(problem, None, BridgeCandidate(trace, Fault(NOT_USABLE, str(error))))

    def _ask_for_solutions(self, proposals: Sequence[Proposals], written: Sequence[Trace]) -> None:
        texts = self._asked([each.problem for each in proposals], written, "teacher", self.teacher.solve)
        for each, text in zip(proposals, texts, strict=True):
            each.raw = text or each.solution
            each.add(text, "teacher")
            each.add(each.solution, "teacher")

    def _ask_for_rewrites(
        self, proposals: Sequence[Proposals], written: Sequence[Trace], exemplars: Sequence[Exemplar]
    ) -> None:
        raw_of = {each.problem.id: each.raw or "" for each in proposals}
        shown = exemplars[: self.settings.exemplars]

        def rewrite(problems: Sequence[Problem]) -> list[str | None]:
            return self.teacher.rewrite(problems, [raw_of[problem.id] for problem in problems], shown)

        texts = self._asked([each.problem for each in proposals], written, "bridged", rewrite)
        for each, text in zip(proposals, texts, strict=True):
            each.rewritten = text
            each.add(text, "bridged")

    def _asked(
        self,
        problems: Sequence[Problem],
        written: Sequence[Trace],
        kind: Provenance,
        ask: Callable[[Sequence[Problem]], list[str | None]],
    ) -> list[str | None]:
        """The teacher's text for each problem: what it wrote before, else what it answers now, which is counted."""
        texts: dict[str, str | None] = {
            trace.problem_id: trace.text for trace in reversed(written) if trace.provenance == kind
        }
        missing = [problem for problem in problems if problem.id not in texts]
        answers = ask(missing) if missing else []
        for problem, text in zip(missing, answers, strict=True):
            texts[problem.id] = text
            if text != problem.trace:  # a trace that came with the dataset costs nothing
                count_written(self.student, [text])
        return [texts[problem.id] for problem in problems]

    def _add_others(self, proposals: Sequence[Proposals], traces: Sequence[Trace]) -> None:
        by_id = {each.problem.id: each for each in proposals}
        for trace in traces:
            if trace.problem_id in by_id:
                by_id[trace.problem_id].add(trace.text, trace.provenance)

    def _hand_over(self, proposals: Sequence[Proposals], sampling: Sampling, watch: Watch | None) -> None:
        continued, handovers = [], []
        for each in proposals:
            prefix = first_steps(each.rewritten or each.raw or "", self.settings.handover_share)
            if prefix is not None:
                continued.append(each)
                handovers.append(Handover(each.problem, prefix))
        texts = hand_over(handovers, self.student, self.engine, sampling, watch)
        for each, text in zip(continued, texts, strict=True):
            each.add(text, "handover")

    # -- verify -----------------------------------------------------------------------------------------------------

    def verify(self, problem: Problem, trace: Trace) -> BridgeCandidate:
        """The trace with its fault, if it has one."""
        tokens = len(self.student.encode_target(trace.text))
        fault = trace_fault(problem, trace.text, tokens, self.settings.max_trace_tokens, self.reward)
        steps = sum(bool(line.strip()) for line in trace.text.splitlines())
        return BridgeCandidate(trace, fault, steps)

    def _candidates(self, proposals: Proposals) -> list[BridgeCandidate]:
        verified = [self.verify(proposals.problem, trace) for trace in proposals.traces]
        return verified + ([proposals.unusable] if proposals.unusable else [])

    # -- select -----------------------------------------------------------------------------------------------------

    def _score(self, problems: Sequence[Problem], candidates: Sequence[list[BridgeCandidate]]) -> None:
        """Scores every candidate that is worth it."""
        scored = []
        for problem, mine in zip(problems, candidates, strict=True):
            for index, candidate in enumerate(mine):
                if _is_scored(candidate, self.settings):
                    scored.append((problem, mine, index))
        texts = [mine[index].trace.text for _, mine, index in scored]
        scores = score_traces(
            [problem for problem, _, _ in scored],
            texts,
            self.student,
            max_rank=self.settings.max_rank,
            token_budget=self.token_budget,
        )
        for (_, mine, index), learnability in zip(scored, scores, strict=True):
            trace = replace(mine[index].trace, learnability=learnability)
            mine[index] = replace(mine[index], trace=trace)

    def select(self, problem: Problem, candidates: Sequence[BridgeCandidate]) -> BridgeResult:
        """The problem with its chosen trace; with none where that trace is known by heart: the next best is worse."""
        chosen = most_learnable(candidates, self.settings)
        scores = chosen.learnability if chosen is not None else None
        if scores is None or scores.mean_nll >= self.settings.min_mean_nll:
            return BridgeResult(problem, tuple(candidates), chosen)
        seen = f"{scores.mean_nll:.3f} nats a token, bridge.min_mean_nll is {self.settings.min_mean_nll}"
        marked = [
            replace(candidate, rejected=Fault(BY_HEART, seen)) if candidate.trace is chosen else candidate
            for candidate in candidates
        ]
        return BridgeResult(problem, tuple(marked), None)


def _drafts(proposals: Sequence[Proposals], candidates: Sequence[list[BridgeCandidate]]) -> list[Draft]:
    """Those that there is a raw trace for."""
    pairs = zip(proposals, candidates, strict=True)
    return [Draft(each.problem, each.raw, mine) for each, mine in pairs if each.raw]


def _is_scored(candidate: BridgeCandidate, settings: BridgeSettings) -> bool:
    """How learnable a rejected raw trace was is worth knowing too; of what was sampled, many may be rejected."""
    if candidate.rejected is None:
        return True
    if settings.samples and candidate.trace.provenance in ("handover", "rationalised"):
        return False
    return candidate.rejected.kind not in (TOO_LONG, NOT_USABLE)


def most_learnable(candidates: Sequence[BridgeCandidate], settings: BridgeSettings) -> Trace | None:
    """Of the traces that passed, that of the lowest rank-surprisal ratio within reach of the student."""
    passed = [candidate.trace for candidate in candidates if candidate.rejected is None]
    if not passed or not settings.select:
        return passed[0] if passed else None
    if settings.raw == "last":
        passed = [trace for trace in passed if trace.provenance != "teacher"] or passed
    scored = [(trace, trace.learnability) for trace in passed if trace.learnability is not None]
    within = [(trace, scores) for trace, scores in scored if scores.mean_nll <= settings.max_mean_nll]
    if not within:
        return min(scored, key=lambda pair: pair[1].mean_nll)[0]
    return min(within, key=lambda pair: pair[1].rank_surprisal_ratio)[0]
