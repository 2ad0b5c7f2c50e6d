"""The pilot of evidence: its arms are valid and differ by what their names say; its tables say what the files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.evidence import CONTROLS, PILOTS, Cost, Row, cost_of, merged, table, written_arms
from slmreason.cli.arms import ARMS
from slmreason.cli.config import build_parser, parse
from slmreason.cli.difference import flat

RECIPE = yaml.safe_load((PILOTS / "evidence-arms.yaml").read_text())


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written_arms(tmp_path_factory.mktemp("arms"), RECIPE)


def test_each_arm_is_a_valid_overlay(arms: dict[str, Path]) -> None:
    parser = build_parser("fit", "")
    base = ["--config=quickstart", f"--config={PILOTS / 'evidence.yaml'}"]
    made = {name: parse(parser, [*base, f"--config={path}"]) for name, path in arms.items()}
    assert set(CONTROLS) <= {*ARMS, *arms}
    assert made["ours_new"].curriculum.probe.share == 0.15
    assert made["ours_new"].grpo.order.class_path == "slmreason.data.order.Informative"
    assert made["without_order"].grpo.order == "random"
    assert made["without_share"].curriculum.probe.share is None
    assert made["without_order"].grpo.cooldown is None
    assert (made["ours_new"].grpo.cooldown, made["with_cooldown"].grpo.cooldown) == (0, 3)
    assert made["sft_then_grpo_600"].data.routing == "all"
    assert {config.curriculum.max_tokens for config in made.values()} == {800_000}


@pytest.mark.parametrize("key", RECIPE["keys"])
def test_an_arm_without_a_key_differs_by_that_key_alone(arms: dict[str, Path], key: str) -> None:
    whole, less = (flat(yaml.safe_load(arms[name].read_text())) for name in ("ours_new", f"without_{key}"))
    assert whole.keys() - less.keys() == flat(RECIPE["keys"][key]).keys()
    assert less.items() <= whole.items()


def test_overlays_are_stacked_key_by_key() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {"e": 5}}) == {
        "a": {"b": 4, "c": 2}, "d": {"e": 5}
    }  # fmt: skip


def test_the_cost_of_a_run_is_that_of_its_files(tmp_path: Path) -> None:
    probe, forward = {"problems": 2, "tokens": 30, "rollouts": 8}, {"problems": 9, "tokens": 5, "rollouts": 0}
    stages = [
        {"stage": "base", "tokens": {"sampled": 0, "trained": 0, "written": 0}},
        {"stage": "round 1 sft", "tokens": {"sampled": 40, "trained": 50, "written": 5}, "measured": [probe, probe]},
        {
            "stage": "round 1 grpo",
            "tokens": {"sampled": 90, "trained": 80, "written": 30},
            "measured": [forward, probe],
        },
    ]
    (tmp_path / "summary.json").write_text(json.dumps(stages))
    shown = [("sft", 0), ("grpo", 0), ("grpo", 4), ("grpo", 2), ("grpo", 4), ("grpo", 0), ("grpo", 1)]
    rows = [{"round": 1, "stage": stage, "attempts": 4, "successes": right} for stage, right in shown]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cost_of(tmp_path) == Cost(tokens=200, measuring=95, groups=4, silent=2)


def curve(arm: str, ahead: float | None) -> dict[str, Any]:
    def estimate(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}

    lead = None if ahead is None else {"area": estimate(ahead), "points": [], "since": 200_000}
    points = [estimate(mean) for mean in (0.5, 0.55, 0.6)]
    return {"arm": arm, "accuracy": points, "area": estimate(0.575), "lead": lead}


def test_a_table_has_the_curve_of_each_arm_or_what_it_came_to() -> None:
    costs = [Cost(100, 15, 10, 1), Cost(100, 5, 10, 2)]
    rows = [
        Row.of("ours_new", costs, "60.0 [59.0, 61.0]", {"mean": curve("ours_new", None)}),
        Row.of("sft_all", [Cost(100, 0, 0, 0)], "60.0 [59.0, 61.0]", {"mean": curve("sft_all", 0.02)}),
    ]
    head, _, ours, other = table(rows, "mean", [100_000, 200_000]).splitlines()
    assert head.count("mean at") == 2
    assert ours.startswith("| `ours_new` | 2 | 10.0 | 15.0 | 55.0 [54.0, 56.0] | 60.0 [59.0, 61.0] | 57.5 [")
    assert other.startswith("| `sft_all` | 1 | 0.0 |  | 55.0")
    assert other.endswith("| +2.0 [+1.0, +3.0] | 200000 |")
    assert len({line.count("|") for line in (head, ours, other)}) == 1
    plain = table([Row.of("ours_new", costs, "60.0 [59.0, 61.0]", {})], "mean", [800_000])
    assert plain.splitlines()[-1] == "| `ours_new` | 2 | 10.0 | 15.0 | 60.0 [59.0, 61.0] |"
