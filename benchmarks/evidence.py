"""Evidence that pays for itself: the method with its keys of evidence beside the method without them and its controls.

    python -m benchmarks.evidence --student qwen2 --seeds 1 2 3 --jobs 2 --out pilots/qwen2

Each arm is run with each seed (`slmreason compare`, one thread a run), then `ours_new` with each of its keys off and
with each of the changes alone, with the first seed alone. What is done is not done again: the same command goes on.
Tables of Markdown are printed, and written to OUT/evidence.md; all figures are in OUT/evidence.json. They are the share
of a run's tokens that went into measuring outside GRPO, the share of GRPO's groups that were silent (all right or all
wrong), and the accuracy at each budget with its 95 % interval. The arms are in benchmarks/pilots. What stands behind
`--` goes to every run: `-- --sft.epochs 3`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import about
from slmreason.cli.arms import Run, find_arm
from slmreason.evaluate.compare import Outcome, summarise
from slmreason.run.files import read_lines
from slmreason.run.folder import RunFolder

PILOTS = Path(__file__).parent / "pilots"
NEW = "ours_new"
CONTROLS = ("ours", "sft_then_grpo", "sft_all", "grpo_only", "random_routing", "sft_then_grpo_600")
BUDGETS = (100_000, 200_000, 400_000, 800_000)


@dataclass(frozen=True)
class Pilot:
    """What is compared on one student."""

    student: str
    seeds: Sequence[int]
    budgets: Sequence[int]
    jobs: int
    out: Path
    extra: Sequence[str] = ()
    """Further arguments of every run."""

    def compare(self, arms: Mapping[str, Path], seeds: Sequence[int]) -> int:
        """Runs what is not done yet of these arms; gives the exit status of `slmreason compare`."""
        command = [
            sys.executable, "-m", "slmreason.cli", "compare", "--config=quickstart",
            f"--config={PILOTS / 'evidence.yaml'}", f"--student.model=embedded:{self.student}",
            f"--curriculum.max_tokens={self.budgets[-1]}", f"--seed_everything={seeds[0]}", f"--seeds={len(seeds)}",
            f"--jobs={self.jobs}", f"--out={self.out}", f"--arms=[{','.join(map(str, arms.values()))}]", *self.extra,
        ]  # fmt: skip
        if len(self.budgets) > 1:
            command.append(f"--curriculum.budgets={list(self.budgets)}")
        return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode

    def rows(self, arms: Sequence[str], seeds: Sequence[int]) -> list[Row]:
        """A row for each arm whose runs have all come to their end, from what the newest `compare` left."""
        outcomes: dict[str, list[Outcome]] = {}
        for arm in arms:
            ends = [Run(arm, seed, self.out / arm).outcome() for seed in seeds]
            if done := [end for end in ends if end is not None] if None not in ends else []:
                outcomes[arm] = done
        if not outcomes:
            return []
        means = {result.arm: str(result.mean) for result in summarise(list(chain(*outcomes.values())), arms)}
        curves = self._curves()
        return [
            Row.of(
                arm,
                [cost_of(Run(arm, seed, self.out / arm).run_dir) for seed in seeds],
                means[arm],
                {of: by_arm[arm] for of, by_arm in curves.items() if arm in by_arm},
            )
            for arm in outcomes
        ]

    def _curves(self) -> dict[str, dict[str, Any]]:
        """By benchmark, and for their mean: by arm, its curve."""
        path = self.out / "curves.json"
        if len(self.budgets) == 1 or not path.is_file():
            return {}
        curves: dict[str, Any] = json.loads(path.read_text())["curves"]
        return {of: {each["arm"]: each for each in arms} for of, arms in curves.items()}


@dataclass(frozen=True)
class Cost:
    """Where a run's tokens and GRPO's groups went."""

    tokens: int
    measuring: int
    """Of the tokens, those sampled to measure outside GRPO."""
    groups: int
    """That GRPO sampled."""
    silent: int
    """Of the groups, those whose rollouts were all right or all wrong."""


def cost_of(run_dir: Path) -> Cost:
    """What a run's files say of its cost."""
    files = RunFolder(run_dir)
    stages = json.loads(files.summary.read_text())
    measured = {stage["stage"]: stage.get("measured", []) for stage in stages}
    probes = {label: sum(each["problems"] for each in found if each["rollouts"]) for label, found in measured.items()}
    groups = silent = 0
    for row in read_lines(files.ledger):
        label = f"round {row['round']} {row['stage']}"
        if row["stage"] != "grpo":
            continue
        if probes.get(label, 0):  # what was measured before a GRPO fit stands before its groups
            probes[label] -= 1
            continue
        groups += 1
        silent += row["successes"] in (0, row["attempts"])
    measuring = sum(each["tokens"] for found in measured.values() for each in found)
    return Cost(sum(stages[-1]["tokens"].values()), measuring, groups, silent)


@dataclass(frozen=True)
class Row:
    """An arm of a table. Shares are of all its runs together."""

    arm: str
    runs: int
    measuring: float
    silent: float | None
    """None where GRPO sampled no group."""
    end: str
    """Accuracy at the end, the mean over the benchmarks, in %."""
    curves: Mapping[str, Any]
    """By benchmark, and for their mean: the arm's curve, as `slmreason compare` writes it; none with one budget."""

    @classmethod
    def of(cls, arm: str, costs: Sequence[Cost], end: str, curves: Mapping[str, Any]) -> Row:
        tokens, groups = sum(cost.tokens for cost in costs), sum(cost.groups for cost in costs)
        measuring = sum(cost.measuring for cost in costs) / tokens if tokens else 0.0
        silent = sum(cost.silent for cost in costs) / groups if groups else None
        return cls(arm, len(costs), measuring, silent, end, curves)

    def cells(self, of: str) -> list[str]:
        """As a line of Markdown has them.

        Args:
            of: a benchmark, or `mean`.
        """
        cells = [f"`{self.arm}`", str(self.runs), percent(self.measuring), percent(self.silent)]
        curve = self.curves.get(of)
        if curve is None:
            return [*cells, self.end]
        lead = curve["lead"]
        ahead = ["", ""] if lead is None else [interval(lead["area"], "+"), str(lead["since"] or "never")]
        return [*cells, *(interval(point) for point in curve["accuracy"][1:]), interval(curve["area"]), *ahead]


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def interval(estimate: Mapping[str, float], sign: str = "") -> str:
    """A mean and its 95 % interval in %; `sign` is `+` for a difference."""
    mean, low, high = (f"{100 * estimate[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def table(rows: Sequence[Row], of: str, budgets: Sequence[int]) -> str:
    """Markdown; without curves the accuracy at the end alone."""
    head = ["arm", "runs", "measuring, % of tokens", "silent, % of groups"]
    if any(row.curves.get(of) for row in rows):
        head += [*(f"{of} at {budget / 1e6:g} M" for budget in budgets), "area", "first ahead by", "since"]
    else:
        head.append(f"mean at {budgets[-1] / 1e6:g} M")
    lines = [head, ["---"] * len(head), *(row.cells(of) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- arms -----------------------------------------------------------------------------------------------------------


def written_arms(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Path]:
    """Writes the arms that are not packaged: `ours_new`, the same without each key or with a change, and controls.

    Args:
        recipe: `pilots/evidence-arms.yaml`.
    """
    settings, keys = recipe["settings"], recipe["keys"]
    arms = {NEW: merged(settings, *keys.values())}
    for left_out in keys:
        arms[f"without_{left_out}"] = merged(settings, *(keys[name] for name in keys if name != left_out))
    for name, change in recipe["changes"].items():
        arms[f"with_{name}"] = merged(arms[NEW], change)
    for name, control in recipe["controls"].items():
        arms[name] = merged(yaml.safe_load(find_arm(control["arm"]).read_text()), control["overlay"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, arm in arms.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(arm))
    return {name: folder / f"{name}.yaml" for name in arms}


def merged(*overlays: Mapping[str, Any]) -> dict[str, Any]:
    """One config of several, stacked; the last wins, key by key."""
    found: dict[str, Any] = {}
    for overlay in overlays:
        for key, value in overlay.items():
            is_deep = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
            found[key] = merged(found[key], value) if is_deep else value
    return found


def main() -> int:
    recipe = yaml.safe_load((PILOTS / "evidence-arms.yaml").read_text())
    options = _parsed(recipe)
    out: Path = options.out
    pilot = Pilot(options.student, options.seeds, options.budgets, options.jobs, out, options.extra)
    written = written_arms(out / "arms", recipe)
    arms = {name: written.get(name, Path(name)) for name in (NEW, *options.arms)}
    altered = [f"without_{key}" for key in options.without] + [f"with_{name}" for name in options.changes]
    one_seed = {name: written[name] for name in (NEW, *altered)}
    failed = pilot.compare(arms, options.seeds)
    if failed == 2:  # a mistake in what was asked
        return failed
    parts = {"arms": pilot.rows(list(arms), options.seeds)}
    if altered:
        failed = max(failed, pilot.compare(one_seed, options.seeds[:1]))
        parts["one key off or changed, one seed"] = pilot.rows(list(one_seed), options.seeds[:1])
        pilot.compare(arms, options.seeds)  # runs nothing: its report and curves are those of the arms again
    text = ""
    for title, rows in parts.items():
        for of in ("mean", "chain") if any(row.curves for row in rows) else ("mean",):
            text += f"{options.student}, {title}, {of}\n\n{table(rows, of, options.budgets)}\n\n"
    print(text)
    (out / "evidence.md").write_text(text)
    found = {title: [asdict(row) for row in rows] for title, rows in parts.items()}
    (out / "evidence.json").write_text(json.dumps({**about(), "parts": found}, indent=1) + "\n")
    return failed


def _parsed(recipe: Mapping[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--student", choices=["qwen2", "llama"], required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), help="ascending; the last ends a run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arms", nargs="*", default=list(CONTROLS), help=f"beside {NEW}")
    parser.add_argument("--without", nargs="*", default=list(recipe["keys"]), help=f"keys of {NEW} to switch off alone")
    parser.add_argument("--changes", nargs="*", default=list(recipe["changes"]), help=f"of {NEW}, each alone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("extra", nargs="*", help="behind --, arguments of every run")
    options = parser.parse_args()
    if options.seeds != list(range(options.seeds[0], options.seeds[0] + len(options.seeds))):
        parser.error(f"--seeds: `slmreason compare` takes seeds that follow one another, got {options.seeds}")
    for flag, asked, known in (
        ("--without", options.without, recipe["keys"]),
        ("--changes", options.changes, recipe["changes"]),
    ):
        if unknown := set(asked) - set(known):
            parser.error(f"{flag}: {sorted(unknown)} are not among {list(known)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
