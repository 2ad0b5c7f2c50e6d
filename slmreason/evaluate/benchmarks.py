"""Benchmarks by name, and the scores of a student on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slmreason.data.mixture import Entry, entries_of
from slmreason.data.reading import Loaded
from slmreason.data.sources import most_common, split_source
from slmreason.evaluate.metrics import MajAtK, PassAtK, ShareOfProblems
from slmreason.records import Problem, Reject, RolloutGroup
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import RolloutEngine, Sampling, prompt_limit
from slmreason.run.files import append_records, write_records
from slmreason.run.progress import Watch
from slmreason.student import Student
from slmreason.verify.gym import PREFIX
from slmreason.verify.rewards import RewardFn

log = logging.getLogger(__name__)
Sample = Callable[[Sequence[Problem]], list[RolloutGroup]]
"""Problems to their groups of answers."""
InParts = Callable[[Sequence[Problem], Sample], list[RolloutGroup]]
"""Goes through all problems with a function that samples some of them."""


@dataclass
class EvaluationSettings:
    """How benchmarks are sampled by `slmreason test`. The table of `fit` is greedy pass@1 on the same problems."""

    samples: int = 8
    """Rollouts of each problem."""
    temperature: float = 1.0
    """0 is greedy, with one sample."""
    top_p: float = 1.0
    """Nucleus of sampling."""
    k: tuple[int, ...] = (1, 8)
    """For which k pass@k and (from 2 on) maj@k are given."""
    max_new_tokens: int = 512
    """A completion is cut here."""
    limit: int | None = None
    """Read no more than so many problems of each benchmark."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.k or min(self.k) < 1 or max(self.k) > self.samples:
            raise ValueError(f"evaluation.k must be within 1 and evaluation.samples ({self.samples}), got {self.k}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("evaluation.temperature 0 is greedy: all samples are the same, set evaluation.samples 1")

    def greedy(self) -> EvaluationSettings:
        """The settings of the table that `fit` prints."""
        return EvaluationSettings(1, 0.0, 1.0, (1,), self.max_new_tokens, self.limit, self.seed)


@dataclass(frozen=True)
class Benchmark:
    """A named set of problems that is never trained on."""

    name: str
    problems: tuple[Problem, ...]
    rejects: tuple[Reject, ...]


@dataclass(frozen=True)
class Score:
    """One number with its 95 % interval."""

    benchmark: str
    metric: str
    value: float
    low: float
    high: float
    problems: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} {100 * self.low:.0f}-{100 * self.high:.0f}"


def load_benchmarks(
    sources: Sequence[str | Entry], settings: EvaluationSettings, student: Student, engine: RolloutEngine
) -> list[Benchmark]:
    """Loads benchmarks: `embedded:FAMILY/test`, a known name, `NAME=FILE`, a file, a hub name, or an entry of these.

    Problems that leave the student or the engine no room for an answer are rejected, as rows are that cannot be read.

    Raises:
        ValueError: one of them cannot be had or has no usable problem, or two have the same short name.
    """
    longest = prompt_limit(student, engine, settings.max_new_tokens, "evaluation.max_new_tokens")
    benchmarks = []
    for entry in entries_of(sources, "benchmarks", limit=settings.limit) if sources else ():
        name, read = entry.path, _read(entry)
        if entry.weight is not None:
            log.warning("benchmark %s: every problem is asked, so its weight says nothing", name)
        loaded = read.within(student.prompt_length, longest.tokens, longest.why)
        if not loaded.problems:
            raise ValueError(f"benchmarks: {name}: every problem was rejected: {most_common(loaded.rejects)}")
        if loaded.rejects:
            log.warning("benchmark %s: %d rows are rejected: %s", name, len(loaded.rejects),
                        most_common(loaded.rejects))  # fmt: skip
        if too_long := len(read.problems) - len(loaded.problems):
            log.warning("benchmark %s: %d of %d prompts are too long: %s", name, too_long, len(read.problems),
                        longest.why)  # fmt: skip
        benchmarks.append(Benchmark(short_name(name), loaded.problems, loaded.rejects))
    if len({benchmark.name for benchmark in benchmarks}) < len(benchmarks):
        raise ValueError(f"benchmarks: two have the same name in {[benchmark.name for benchmark in benchmarks]}")
    return benchmarks


def _read(entry: Entry) -> Loaded:
    """What a benchmark gives; a reason names the keys of its own entry, since `data.columns` is of the pool."""
    try:
        loaded = entry.read("benchmarks")
    except ValueError as error:
        raise ValueError(_of_entry(str(error))) from error
    return replace(loaded, rejects=tuple(replace(each, reason=_of_entry(each.reason)) for each in loaded.rejects))


def _of_entry(reason: str) -> str:
    return reason.replace("data.columns.", "benchmarks[].columns.")


def short_name(source: str) -> str:
    """`embedded:chain/test?count=9` -> `chain`; `svamp=x.jsonl` -> `svamp`; a path -> its file name."""
    if source.startswith("embedded:"):
        return source.removeprefix("embedded:").partition("/")[0].partition("?")[0]
    if source.startswith(PREFIX):
        return source.removeprefix(PREFIX).partition("?")[0]
    head = split_source(source)[0]
    return Path(head).name.partition(".")[0] if "." in head else head


def evaluate(
    student: Student,
    engine: RolloutEngine,
    reward: RewardFn,
    benchmarks: Sequence[Benchmark],
    settings: EvaluationSettings,
    watch: Watch | None = None,
    answers: Path | None = None,
    in_parts: InParts = lambda problems, sample: sample(problems),
) -> list[Score]:
    """Scores of the student as it stands now: for each benchmark pass@k and, for k of 2 or more, maj@k.

    Args:
        answers: a JSONL file for every completion with its verdict.
        in_parts: samples all problems a part at a time, so that what is done can be kept.
    """
    engine.sync(student)
    # One call for all benchmarks: the engine then fills its batches across them.
    problems = [problem for benchmark in benchmarks for problem in benchmark.problems]
    sampling = Sampling(
        settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed, with_log_probs=False
    )

    def sample(part: Sequence[Problem]) -> list[RolloutGroup]:
        return collect(student, engine, reward, part, settings.samples, sampling, watch)

    groups = in_parts(problems, sample)
    if answers is not None:
        names = [benchmark.name for benchmark in benchmarks for _ in benchmark.problems]
        write_records(
            answers, [row for name, group in zip(names, groups, strict=True) for row in answer_rows(name, group)]
        )
    scores, start = [], 0
    for benchmark in benchmarks:
        mine = groups[start : start + len(benchmark.problems)]
        start += len(benchmark.problems)
        metrics: dict[str, ShareOfProblems] = {}
        for k in settings.k:
            metrics[f"pass@{k}"] = PassAtK(k)
            if k > 1:
                metrics[f"maj@{k}"] = MajAtK(k)
        for name, metric in metrics.items():
            metric.update(mine)
            low, high = metric.interval()
            scores.append(Score(benchmark.name, name, float(metric.compute()), low, high, len(mine)))
    return scores


def answer_rows(benchmark: str, group: RolloutGroup) -> list[dict[str, Any]]:
    """What the student answered to one problem of a benchmark, and whether it was right."""
    return [
        {"benchmark": benchmark, "problem_id": group.problem.id, "question": group.problem.whole_question,
         "answer": group.problem.answer, "correct": rollout.correct,
         "truncated": rollout.truncated, "tokens": len(rollout.completion_ids), "text": rollout.text}
        for rollout in group.rollouts
    ]  # fmt: skip


def save_scores(path: Path, label: str, scores: Sequence[Score]) -> None:
    """Appends scores to a JSONL file, one line each."""
    append_records(path, [{"after": label, **asdict(score)} for score in scores])
