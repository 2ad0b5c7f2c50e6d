"""pass@k, maj@k and their intervals."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from slmreason.data.columns import Columns
from slmreason.data.mixture import Entry
from slmreason.evaluate.benchmarks import EvaluationSettings, load_benchmarks, short_name
from slmreason.evaluate.metrics import MajAtK, PassAtK, pass_at_k
from slmreason.records import Problem, Rollout, RolloutGroup, wilson_interval
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student


def group(answers: list[str], gold: str = "1") -> RolloutGroup:
    rollouts = tuple(Rollout((), (), (), f"\\boxed{{{a}}}", float(a == gold), a == gold, False, 0) for a in answers)
    return RolloutGroup(Problem("p", "q", gold), rollouts)


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 2), (6, 5), (4, 4)])
def test_pass_at_k_equals_counting_all_subsets(n: int, c: int) -> None:
    for k in range(1, n + 1):
        subsets = list(combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_metrics_accumulate_over_updates() -> None:
    metric = PassAtK(2)
    metric.update([group(["1", "2", "3", "4"])])
    metric.update([group(["1", "1", "1", "1"]), group(["2", "2", "2", "2"])])
    assert float(metric.compute()) == pytest.approx((0.5 + 1 + 0) / 3)
    low, high = metric.interval()
    assert 0 <= low <= 0.5 <= high <= 1
    with pytest.raises(ValueError, match="k is 2"):
        metric.update([group(["1"])])


def test_majority_counts_values_and_breaks_ties_by_first_seen() -> None:
    metric = MajAtK(4)
    metric.update([group(["2", "1", "1.0", "3"]), group(["2", "1", "2", "1"]), group(["", "", "", "1"])])
    assert metric.scores[0].tolist() == [1.0, 0.0, 1.0]


def test_wilson_interval_against_a_table() -> None:
    # Newcombe 1998, table I, method 3: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_settings_refuse_what_cannot_be_computed() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.k"):
        EvaluationSettings(samples=4, k=(8,))
    with pytest.raises(ValueError, match="greedy"):
        EvaluationSettings(samples=8, temperature=0.0)
    assert EvaluationSettings().greedy().samples == 1


def test_benchmarks_have_short_names() -> None:
    assert [short_name(n) for n in ("embedded:chain/test?count=9", "svamp=a/b.jsonl", "x/y.jsonl.gz", "mawps")] == [
        "chain",
        "svamp",
        "y",
        "mawps",
    ]
    [benchmark] = load_benchmarks(
        ["embedded:chain/test?count=9"], EvaluationSettings(limit=4), Student("embedded:qwen2"), HFEngine()
    )
    assert (benchmark.name, len(benchmark.problems)) == ("chain", 4)


def test_a_benchmark_is_an_entry_with_columns_and_a_limit_of_its_own(tmp_path: Path, student: Student) -> None:
    file = tmp_path / "held.jsonl"
    file.write_text("".join(f'{{"q": "{n} + 1 = ?", "a": "{n + 1}"}}\n' for n in range(9)))
    entry = Entry(f"held={file}", Columns(question="q", answer="a"), limit=4)
    [benchmark] = load_benchmarks([entry], EvaluationSettings(limit=6), student, HFEngine())
    assert (benchmark.name, len(benchmark.problems)) == ("held", 4)
    with pytest.raises(ValueError, match=r"held=.*benchmarks\[\]\.columns\.question names the column"):
        load_benchmarks([f"held={file}"], EvaluationSettings(), student, HFEngine())
