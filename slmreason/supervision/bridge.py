"""The Bridge: a hard problem's raw teacher trace becomes supervision that this student can learn.

Propose candidates, verify each, select the most learnable by rank-surprisal ratio. All candidates of all problems are
proposed with one call a kind, continued in one batched generate, and scored in packed batches without gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from slmreason.objectives import rank_surprisal
from slmreason.records import (
    Band,
    BridgeCandidate,
    BridgeResult,
    Example,
    Exemplar,
    Learnability,
    Problem,
    Provenance,
    Trace,
)
from slmreason.rollout.engine import Completion, RolloutEngine, Sampling, prompt_limit
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import map_over_processes
from slmreason.student import Student
from slmreason.student.packing import collate, plan_batches
from slmreason.teacher.base import Teacher
from slmreason.teacher.dataset import dataset_solution
from slmreason.verify.equations import false_equations
from slmreason.verify.rewards import RewardFn
from slmreason.verify.verdicts import verdict_on

log = logging.getLogger(__name__)


@dataclass
class BridgeSettings:
    """How hard problems are bridged."""

    bands: tuple[Band, ...] = ("hard",)
    """Problems of these bands are bridged; in SFT the others have their raw teacher trace."""
    select: bool = True
    """Choose among raw, rewritten and handed-over traces; false trains on the raw trace (a control)."""
    handover: bool = True
    """Propose the teacher's first steps followed by the student's own continuation."""
    handover_share: float = 0.5
    """Share of the teacher's steps that are handed over."""
    max_trace_tokens: int = 512
    """A longer candidate is dropped and counted."""
    max_mean_nll: float = 3.0
    """Nats a token. A trace beyond it is chosen only when every other is beyond it too: ranks are capped and
    surprisal is not, so the ratio alone would favour a near-impossible trace."""
    min_mean_nll: float = 0.0
    """Nats a token. A chosen trace below it is known by heart: training on it again teaches nothing and costs what the
    student knows besides, so it is dropped, and its problem is left to GRPO and CFT."""
    max_rank: int = 100
    """Ranks are capped here in the rank-surprisal ratio."""
    exemplars: int = 3
    """The student's own correct solutions that the teacher is shown as style."""
    traces: str | None = None
    """File of `slmreason bridge`, perhaps edited: its chosen traces are verified and trained on as they are."""

    def raw(self) -> BridgeSettings:
        """The same for problems that are not bridged: their raw trace is verified, and nothing else is proposed."""
        return replace(self, select=False)


TOO_LONG = "too long"
NO_SOLUTION = "the dataset's solution cannot be used"
BY_HEART = "known by heart"


def check_trace(problem: Problem, text: str, num_tokens: int, max_tokens: int, reward: RewardFn) -> str | None:
    """None when a trace may be trained on, else the reason it may not."""
    if num_tokens > max_tokens:
        return f"{TOO_LONG}: {num_tokens} tokens, the cap is {max_tokens}"
    if not verdict_on(reward, problem, text).correct:
        return "final answer does not verify"
    wrong = false_equations(text)
    return f"false equation: {wrong[0]}" if wrong else None


def bridge(
    problems: Sequence[Problem],
    student: Student,
    engine: RolloutEngine,
    teacher: Teacher,
    reward: RewardFn,
    settings: BridgeSettings,
    sampling: Sampling,
    exemplars: Sequence[Exemplar] = (),
    more: Sequence[Trace] = (),
    known: Sequence[Trace] = (),
    token_budget: int = 8192,
    watch: Watch | None = None,
) -> list[BridgeResult]:
    """Proposes, verifies, scores and selects a trace for each problem.

    The solution that came with a problem is always among the candidates, whoever the teacher is.

    Args:
        sampling: how the student continues a hand-over.
        exemplars: right solutions of the student itself, shown to the teacher as style.
        more: further candidates: the student's own right solutions, the new traces of the critique round before.
        known: what the teacher wrote in earlier rounds; the student has changed since, the teacher has not, so it is
            not asked, and paid, again.
        watch: counts hand-overs while they are sampled, one a problem.
    """
    own = [None] * len(problems) if teacher.has_dataset_solutions else list(map(_own, problems))
    solutions = [None if isinstance(found, BridgeCandidate) else found for found in own]
    proposals = _propose(
        problems, solutions, student, engine, teacher, settings, sampling, exemplars, more, known, watch
    )
    checked = [
        [_checked(problem, trace, student, reward, settings) for trace in traces]
        + ([found] if isinstance(found, BridgeCandidate) else [])
        for problem, traces, found in zip(problems, proposals, own, strict=True)
    ]
    scored = _score(problems, checked, student, settings.max_rank, token_budget)
    return [_selected(problem, candidates, settings) for problem, candidates in zip(problems, scored, strict=True)]


def reverified(
    problem: Problem, trace: Trace, student: Student, reward: RewardFn, settings: BridgeSettings
) -> BridgeResult:
    """A trace that was chosen before, and perhaps edited since: verified again, with no other beside it."""
    candidate = _checked(problem, trace, student, reward, settings)
    return BridgeResult(problem, (candidate,), None if candidate.rejected else trace)


def _checked(
    problem: Problem, trace: Trace, student: Student, reward: RewardFn, settings: BridgeSettings
) -> BridgeCandidate:
    tokens = len(student.encode_target(trace.text))
    fault = check_trace(problem, trace.text, tokens, settings.max_trace_tokens, reward)
    return BridgeCandidate(trace, fault, sum(bool(line.strip()) for line in trace.text.splitlines()))


def _own(problem: Problem) -> str | BridgeCandidate | None:
    """The solution that came with a problem; a fallen candidate where it cannot be used, which is said."""
    try:
        return dataset_solution(problem)
    except ValueError as error:
        return BridgeCandidate(Trace(problem.id, problem.trace or "", "teacher"), f"{NO_SOLUTION}: {error}")


def _propose(
    problems: Sequence[Problem],
    solutions: Sequence[str | None],
    student: Student,
    engine: RolloutEngine,
    teacher: Teacher,
    settings: BridgeSettings,
    sampling: Sampling,
    exemplars: Sequence[Exemplar],
    more: Sequence[Trace],
    known: Sequence[Trace],
    watch: Watch | None,
) -> list[list[Trace]]:
    proposals: list[list[Trace]] = [[] for _ in problems]

    def add(index: int, text: str | None, provenance: Provenance) -> None:
        known = {trace.text for trace in proposals[index]}
        if text and text not in known:
            proposals[index].append(Trace(problems[index].id, text, provenance))

    # The teacher is asked again where all that is known is the solution that came with the problem.
    came = {(problem.id, text) for problem, text in zip(problems, solutions, strict=True)}
    known = [trace for trace in known if (trace.problem_id, trace.text) not in came]
    answers = _asked(problems, known, "teacher", teacher.solve, student)
    for index, (text, solution) in enumerate(zip(answers, solutions, strict=True)):
        add(index, text, "teacher")
        add(index, solution, "teacher")
    raw = [text or solution for text, solution in zip(answers, solutions, strict=True)]
    places = {problem.id: index for index, problem in enumerate(problems)}
    others = [(places[trace.problem_id], trace) for trace in more if trace.problem_id in places]
    if not settings.select:
        for index, trace in others:  # a problem without a raw trace has what the student wrote itself
            if not raw[index]:
                add(index, trace.text, trace.provenance)
        return proposals
    have_raw = [index for index, text in enumerate(raw) if text]
    raw_of = {problems[index].id: raw[index] or "" for index in have_raw}

    def rewrite(asked: Sequence[Problem]) -> list[str | None]:
        return teacher.rewrite(asked, [raw_of[problem.id] for problem in asked], exemplars[: settings.exemplars])

    answers = _asked([problems[index] for index in have_raw], known, "bridged", rewrite, student)
    rewritten = dict(zip(have_raw, answers, strict=True))
    for index, text in rewritten.items():
        add(index, text, "bridged")
    for index, trace in others:
        add(index, trace.text, trace.provenance)
    if settings.handover:
        guides = {index: rewritten[index] or raw[index] for index in have_raw}
        for index, text in _hand_over(problems, guides, student, engine, settings, sampling, watch).items():
            add(index, text, "handover")
    return proposals


def _asked(
    problems: Sequence[Problem],
    known: Sequence[Trace],
    kind: Provenance,
    ask: Callable[[Sequence[Problem]], list[str | None]],
    student: Student,
) -> list[str | None]:
    """The teacher's text for each problem: what it wrote before, else what it answers now, which is counted."""
    texts: dict[str, str | None] = {t.problem_id: t.text for t in reversed(known) if t.provenance == kind}
    missing = [problem for problem in problems if problem.id not in texts]
    answers = ask(missing) if missing else []
    # A trace that came with the dataset costs nothing.
    student.count_written(text for problem, text in zip(missing, answers, strict=True) if text != problem.trace)
    texts.update(zip((problem.id for problem in missing), answers, strict=True))
    return [texts[problem.id] for problem in problems]


def _hand_over(
    problems: Sequence[Problem],
    guides: dict[int, str | None],
    student: Student,
    engine: RolloutEngine,
    settings: BridgeSettings,
    sampling: Sampling,
    watch: Watch | None,
) -> dict[int, str]:
    """The teacher's first steps, then the student's continuation: one batched generate for all problems."""
    prefixes: dict[int, str] = {}
    for index, guide in guides.items():
        lines = (guide or "").strip().splitlines()
        kept = max(1, int(len(lines) * settings.handover_share))
        if kept < len(lines):
            prefixes[index] = "\n".join(lines[:kept]) + "\n"
    if not prefixes:
        return {}
    # The student's own tokens for prefix and continuation are joined as text, then encoded once as a target.
    encoded = {
        index: student.encode_problem(problems[index]) + student.chat.text(prefix) for index, prefix in prefixes.items()
    }
    longest = prompt_limit(student, engine, sampling.max_new_tokens, f"{sampling.max_new_tokens} new tokens")
    prompts = {index: prompt for index, prompt in encoded.items() if len(prompt) <= longest.tokens}
    if len(prompts) < len(encoded):
        log.warning("bridge: %d of %d hand-overs are not tried, the teacher's steps are too long: %s; lower "
                    "bridge.handover_share or bridge.max_trace_tokens", len(encoded) - len(prompts), len(encoded),
                    longest.why)  # fmt: skip
    engine.sync(student)
    progress = None if watch is None else watch.advance

    def sample(share: list[tuple[int, ...]]) -> list[list[Completion]]:
        return engine.generate(student, share, 1, sampling, progress)

    completions = map_over_processes(sample, list(prompts.values()))
    student.tokens.sampled += sum(len(completion.token_ids) for group in completions for completion in group)
    return {
        index: prefixes[index] + student.decode(group[0].token_ids)
        for index, group in zip(prompts, completions, strict=True)
        if not group[0].truncated
    }


@torch.no_grad()
def score_traces(
    problems: Sequence[Problem], texts: Sequence[str], student: Student, max_rank: int = 100, token_budget: int = 8192
) -> list[Learnability]:
    """Rank-surprisal ratio and mean NLL of each trace under the student, packed, without gradient."""
    examples = [
        Example(student.encode_problem(problem), student.encode_target(text), problem.id, "teacher")
        for problem, text in zip(problems, texts, strict=True)
    ]
    with student.evaluating(), student.whole():
        return map_over_processes(lambda share: _score_examples(share, student, max_rank, token_budget), examples)


def _score_examples(
    examples: Sequence[Example], student: Student, max_rank: int, token_budget: int
) -> list[Learnability]:
    results: dict[int, Learnability] = {}
    for members in plan_batches([len(example) for example in examples], token_budget):
        chosen = [examples[i] for i in members]
        packed = collate(chosen, student.pad_token_id, hidden_size=student.hidden_size, device_type=student.device.type)
        batch = packed.to(student.device)
        scores = student.score(batch, with_ranks=True)
        assert scores.ranks is not None
        sizes = batch.target_lengths.tolist()
        pieces = zip(batch.order, scores.ranks.split(sizes), scores.log_probs.split(sizes), strict=True)
        for position, ranks, log_probs in pieces:
            ratio, mean_nll = rank_surprisal(ranks, log_probs, max_rank)
            results[members[position]] = Learnability(ratio, mean_nll, len(ranks))
    return [results[index] for index in range(len(examples))]


def _score(
    problems: Sequence[Problem],
    candidates: list[list[BridgeCandidate]],
    student: Student,
    max_rank: int,
    token_budget: int,
) -> list[list[BridgeCandidate]]:
    """Scores every candidate but those that are too long; how learnable a fallen raw trace was is worth knowing too."""
    places = [
        (i, j)
        for i, row in enumerate(candidates)
        for j, candidate in enumerate(row)
        if not (candidate.rejected or "").startswith((TOO_LONG, NO_SOLUTION))
    ]
    texts = [candidates[i][j].trace.text for i, j in places]
    scores = score_traces([problems[i] for i, _ in places], texts, student, max_rank, token_budget)
    result = [list(row) for row in candidates]
    for (i, j), learnability in zip(places, scores, strict=True):
        result[i][j] = replace(result[i][j], trace=replace(result[i][j].trace, learnability=learnability))
    return result


def _selected(problem: Problem, candidates: Sequence[BridgeCandidate], settings: BridgeSettings) -> BridgeResult:
    """The problem with its chosen trace; with none where that trace is known by heart, since the next best is worse."""
    chosen = _select(candidates, settings)
    scores = chosen.learnability if chosen is not None else None
    if scores is None or scores.mean_nll >= settings.min_mean_nll:
        return BridgeResult(problem, tuple(candidates), chosen)
    reason = f"{BY_HEART}: {scores.mean_nll:.3f} nats a token, bridge.min_mean_nll is {settings.min_mean_nll}"
    marked = [replace(c, rejected=reason) if c.trace is chosen else c for c in candidates]
    return BridgeResult(problem, tuple(marked), None)


def _select(candidates: Sequence[BridgeCandidate], settings: BridgeSettings) -> Trace | None:
    """The most learnable trace of those that passed: lowest rank-surprisal ratio within reach of the student."""
    passed = [candidate.trace for candidate in candidates if candidate.rejected is None]
    if not passed or not settings.select:
        return passed[0] if passed else None
    scored = [(trace, trace.learnability) for trace in passed if trace.learnability is not None]
    within = [(trace, scores) for trace, scores in scored if scores.mean_nll <= settings.max_mean_nll]
    if not within:
        return min(scored, key=lambda pair: pair[1].mean_nll)[0]
    return min(within, key=lambda pair: pair[1].rank_surprisal_ratio)[0]
