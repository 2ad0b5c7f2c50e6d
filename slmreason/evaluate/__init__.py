"""Benchmarks, their scores, and the method beside its controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.evaluate.benchmarks import Benchmark, EvaluationSettings, Score, load_benchmarks

__all__ = [
    "Benchmark",
    "EvaluationSettings",
    "Score",
    "load_benchmarks",
]

__getattr__ = lazily(
    __name__,
    {
        "Benchmark": "benchmarks",
        "EvaluationSettings": "benchmarks",
        "Score": "benchmarks",
        "load_benchmarks": "benchmarks",
    },
)
