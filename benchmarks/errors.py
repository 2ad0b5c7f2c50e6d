"""What is wrong in the answers that the runs of `slmreason compare` ended with: arithmetic or else, and by steps.

    python -m benchmarks.errors compare/qwen2 --arms base ours sft_then_grpo sft_all grpo_only

A row of Markdown for each arm, means over its seeds: problems of the benchmark that are right, wrong with an equation
that is false, and wrong otherwise; then the share that is right, in %, of the problems with one step, two, and so on.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmreason.embedded.families import rebuild
from slmreason.run.files import read_lines
from slmreason.run.folder import RunFolder
from slmreason.verify.equations import false_equations


def last_answers(run_dir: Path, benchmark: str) -> Iterator[dict[str, Any]]:
    """The answers to one benchmark after the last stage that was scored."""
    stages = json.loads((run_dir / "summary.json").read_text())
    last = [stage["stage"] for stage in stages if stage["scores"]][-1]
    return (row for row in read_lines(RunFolder(run_dir).answers(last)) if row["benchmark"] == benchmark)


def kind(row: dict[str, Any]) -> str:
    if row["correct"]:
        return "right"
    return "false equation" if false_equations(row["text"]) else "otherwise"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what `slmreason compare --out` named")
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--benchmark", default="chain", help="an embedded family")
    options = parser.parse_args()
    for arm in options.arms:
        runs = [path.parent for path in (options.folder / arm).glob("seed-*/summary.json")]
        rows = [row for run in runs for row in last_answers(run, options.benchmark)]
        kinds = Counter(kind(row) for row in rows)
        counts = [f"{kinds[name] / len(runs):.0f}" for name in ("right", "false equation", "otherwise")]
        steps = Counter((len(rebuild(row["problem_id"]).steps), row["correct"]) for row in rows)
        shares = [
            f"{100 * steps[n, True] / (steps[n, True] + steps[n, False]):.0f}" for n in sorted({n for n, _ in steps})
        ]
        print(f"| `{arm}` | {' | '.join(counts + shares)} |")


if __name__ == "__main__":
    main()
