"""What the Bridge finds for a student's hard problems without a teacher that rewrites, and what that costs.

    python -m benchmarks.bridge --student FOLDER --data openai/gsm8k=train.jsonl.gz --problems 64

The pool is probed in its order until so many hard problems are found (rho below 0.25). Then the Bridge proposes for
them, with the dataset's solutions alone: one greedy hand-over at one half (`greedy`), and hand-overs searched for with
what is left rationalised (`sampled`). Beside each kind of candidate stands for how many problems one passed; `served`
are problems with a verified candidate that is not the raw trace, `served_by_sampling` those of them that have no right
rollout in the probe. `share` is the tokens sampled over those of the probe of the same problems. `--traces` keeps all
candidates of `sampled` with their scores, for `python -m benchmarks.bridged`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from benchmarks.common import quiet, save, timed
from benchmarks.probe import add_arguments, probed
from benchmarks.sft import DType
from slmreason.data.sources import load_problems
from slmreason.embedded.families import rebuild, write_solution
from slmreason.records import BridgeResult, Evidence, Problem, Provenance, Trace
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.run.files import write_records
from slmreason.student import Lora, Student
from slmreason.supervision.bridge import Bridge, Material
from slmreason.supervision.settings import BridgeSettings
from slmreason.teacher.dataset import TraceTeacher
from slmreason.verify.rewards import AnswerReward

HARD = 0.25
"""Rho of a hard problem is below it."""


@dataclass(frozen=True)
class Probe:
    """Hard problems, and what their probe showed and took."""

    evidence: tuple[Evidence, ...]
    problems: tuple[Problem, ...]
    probed: int
    """Problems in all, hard or not."""

    @property
    def tokens(self) -> int:
        return sum(evidence.tokens for evidence in self.evidence)

    @property
    def own(self) -> list[Trace]:
        """The student's own right solutions, as a run has them from its ledger."""
        return [Trace(each.problem_id, each.solution, "self") for each in self.evidence if each.solution]


def with_solution(problem: Problem) -> Problem:
    """An embedded problem with a solution that says as much in another way than the embedded student's."""
    if problem.trace is not None:
        return problem
    steps = [f"So {step.text}" for step in rebuild(problem.id).steps]
    return replace(problem, trace=write_solution(steps, problem.answer))


def student_of(name: str, dtype: DType, lora: Lora | None = None) -> Student:
    """A student that is asked as it was trained to be: the embedded ones without an instruction."""
    if name.startswith("embedded:"):
        return Student(name, dtype=dtype, lora=lora, instruction="")
    return Student(name, dtype=dtype, lora=lora)


def probe(student: Student, pool: Sequence[Problem], options: argparse.Namespace) -> Probe:
    """Measures the pool in its order until there are enough hard problems."""

    def hard(found: Sequence[Evidence]) -> list[Evidence]:
        return [each for each in found if each.rho < HARD]

    found = probed(student, pool, options, lambda found: len(hard(found)) >= options.problems)
    kept, by_id = hard(found)[: options.problems], {problem.id: problem for problem in pool}
    return Probe(tuple(kept), tuple(by_id[each.problem_id] for each in kept), len(found))


def row_of(name: str, results: Sequence[BridgeResult], measured: Probe, tokens: int, seconds: float) -> dict[str, Any]:
    """What one way of proposing found."""
    kinds: dict[str, dict[str, int]] = {}
    served: set[str] = set()
    for kind in get_args(Provenance):
        mine = [(r.problem.id, c) for r in results for c in r.candidates if c.trace.provenance == kind]
        passed = {problem_id for problem_id, candidate in mine if candidate.rejected is None}
        chosen = sum(r.chosen is not None and r.chosen.provenance == kind for r in results)
        kinds[kind] = {"proposed": len(mine), "problems_with_one": len(passed), "chosen": chosen}
        if kind != "teacher":
            served |= passed
    solved = {trace.problem_id for trace in measured.own}
    return {
        "proposals": name,
        "problems": len(results),
        "served": len(served),
        "served_by_sampling": len(served - solved),
        "tokens": tokens,
        "share": tokens / measured.tokens,
        "seconds": round(seconds, 1),
        "kinds": kinds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--student", default="embedded:qwen2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="embedded:chain/train?count=64&difficulty=5,6")
    parser.add_argument("--problems", type=int, default=64, help="hard ones")
    add_arguments(parser, attempts=8)
    parser.add_argument("--handover_samples", type=int, default=4)
    parser.add_argument("--rationalise", type=int, default=2)
    parser.add_argument("--max_sampled_tokens", type=int, default=200)
    parser.add_argument("--traces", type=Path, help="where to keep the candidates of `sampled`")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    student = student_of(options.student, options.dtype)
    student.to(options.device)
    pool = [with_solution(problem) for problem in load_problems(options.data).problems]
    measured = probe(student, pool, options)
    if not measured.problems:
        parser.error(f"none of the {measured.probed} problems of --data is hard for this student")
    print(f"probe of {len(measured.problems)} hard problems: {measured.tokens} tokens", flush=True)
    ways = {
        "greedy": BridgeSettings(max_trace_tokens=options.tokens),
        "sampled": BridgeSettings(
            max_trace_tokens=options.tokens,
            handover_search=True,
            handover_samples=options.handover_samples,
            rationalise=options.rationalise,
            max_sampled_tokens=options.max_sampled_tokens,
        ),
    }
    rows: list[dict[str, Any]] = []
    sampling = Sampling(options.tokens, temperature=0.0, seed=options.seed, with_log_probs=False)
    for name, settings in ways.items():
        bridge = Bridge(student, HFEngine(), TraceTeacher(), AnswerReward(), settings)
        before = student.tokens.sampled
        results: list[BridgeResult] = []
        seconds = timed(
            lambda bridge=bridge, results=results: results.extend(  # type: ignore[misc]
                bridge.make(measured.problems, sampling, Material(traces=measured.own))
            )
        )
        rows.append(row_of(name, results, measured, student.tokens.sampled - before, seconds))
        print(rows[-1], flush=True)
        if name == "sampled" and options.traces is not None:
            write_records(options.traces, results)
    save(options.out, rows)


if __name__ == "__main__":
    main()
