"""TrainingHealth: what goes wrong slowly is said once, with number and remedy; a healthy fit is left alone."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmreason.callbacks import SampleCompletions, TrainingHealth
from slmreason.cli import main
from slmreason.curriculum.trainer import with_callbacks
from slmreason.records import Problem, Rollout, RolloutGroup
from slmreason.run.tree import load_tree, save_tree
from tests.runs import SMALL

NAN = float("nan")
PROBLEM = Problem("p", "1+1?", "2")


def group(rewards: Sequence[float], tokens: int = 20, truncated: bool = False) -> RolloutGroup:
    ids = tuple(range(tokens))
    rollouts = (Rollout((1,), ids, (-1.0,) * tokens, "", r, r > 0.5, truncated, 0) for r in rewards)
    return RolloutGroup(PROBLEM, tuple(rollouts))


def batch(share: float, **options: Any) -> list[RolloutGroup]:
    """A hundred rollouts, of which this share is right, in informative groups unless all are of one kind."""
    right = round(100 * share)
    return [group([1.0] * right + [0.0] * (100 - right), **options)]


class Fit:
    """A trainer's and a module's part in what the callback sees."""

    def __init__(self, folder: Path, stage: str = "grpo", health: TrainingHealth | None = None) -> None:
        self.health = health or TrainingHealth()
        self.file = folder / "health.jsonl"
        self.module = SimpleNamespace(stage=stage)
        self.trainer = SimpleNamespace(
            callback_metrics={}, global_step=0, current_epoch=0, default_root_dir=str(folder)
        )
        self.batches = 0
        self.stepped = True
        """Whether each batch makes an optimizer step."""
        self.health.setup(self.trainer, self.module, "fit")  # type: ignore[arg-type]

    def step(self, groups: Sequence[RolloutGroup] | None = None, **metrics: float) -> None:
        self.trainer.callback_metrics = {f"{self.module.stage}/{name}": value for name, value in metrics.items()}
        self.trainer.global_step += self.stepped
        outputs = {"rollout_groups": groups} if groups is not None else {}
        self.health.on_train_batch_end(self.trainer, self.module, outputs, None, self.batches)  # type: ignore[arg-type]
        self.batches += 1

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    @property
    def said(self) -> list[tuple[str, int]]:
        """(condition, number of batches by then) of each warning."""
        return [(row["condition"], row["batch"] + 1) for row in self.rows]


@pytest.fixture(autouse=True)
def plain_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that ran before in this process has taken the log to the screen alone."""
    ours = logging.getLogger("slmreason")
    monkeypatch.setattr(ours, "propagate", True)
    handlers, level = ours.handlers[:], ours.level
    yield
    ours.handlers[:] = handlers
    ours.setLevel(level)


# (stage, a batch while all is well, a batch when it is not, condition, words of the message)
CONDITIONS = {
    "reward": (
        "grpo", (batch(0.6), {}), (batch(0.1), {}), "reward collapse",
        ["the reward is", "at its best it was 0.6", "grpo.learning_rate", "grpo.kl"],
    ),
    "entropy share": (
        "grpo", (batch(0.5), {"entropy": 2.0}), (batch(0.5), {"entropy": 0.1}), "entropy collapse",
        ["nats a token", "at first it was 2", "grpo.clip_high", "grpo.temperature"],
    ),
    "entropy floor": (
        "grpo", (batch(0.5), {"entropy": 0.02}), (batch(0.5), {"entropy": 0.0055}), "entropy collapse",
        ["the entropy is 0.00", "at first it was 0.02"],
    ),
    "length": (
        "grpo", (batch(0.5, tokens=20), {}), (batch(0.5, tokens=80), {}), "length blow-up",
        ["tokens over the last 10 batches", "at first they had 20", "dr_grpo"],
    ),
    "truncation": (
        "grpo", (batch(0.5), {}), (batch(0.5, truncated=True), {}), "truncation",
        ["% of the completions were cut", "grpo.max_completion_tokens"],
    ),
    "kl": (
        "grpo", (batch(0.5), {"kl": 0.05}), (batch(0.5), {"kl": 3.0}), "far from the reference",
        ["nats a token from its reference", "Raise grpo.kl"],
    ),
    "mismatch": (
        "grpo", (batch(0.5), {"sampler_mismatch": 0.001}), (batch(0.5), {"sampler_mismatch": 0.9}), "sampler mismatch",
        ["sampler and trainer differ by", "rollout.dtype", "grpo.importance_cap"],
    ),
    "sft loss": (
        "sft", (None, {"loss_step": 2.0}), (None, {"loss_step": 5.0}), "loss rises",
        ["the loss is", "at first it was 2", "learning_rate", "trainer.gradient_clip_val"],
    ),
    "cft loss": ("cft", (None, {"loss_step": 0.1}), (None, {"loss_step": 9.0}), "loss rises", ["the loss is"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_is_said_once_with_its_number_and_the_remedy(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage, (well, good), (ill, bad), condition, words = CONDITIONS[name]
    fit = Fit(tmp_path, stage)
    for _ in range(20):
        fit.step(well, **good)
    assert fit.said == []
    assert caplog.text == ""
    for _ in range(60):
        fit.step(ill, **bad)
    [(said, when)] = fit.said
    assert said == condition
    assert 20 < when <= 30
    [record] = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{stage}: ")
    assert [word for word in words if word not in message] == []
    [row] = fit.rows
    assert message == f"{stage}: {row['says']}. {row['remedy']}"
    assert row["says"].find(f"{row['number']:.2g}"[:3]) >= 0 or condition == "truncation"


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([group([0.0] * 4)], ["every rollout failed", "more SFT first"]),
        ([group([1.0] * 4)], ["every rollout succeeded", "data.review_share"]),
        ([group([1.0] * 4), group([0.0] * 4)], ["each failed or succeeded as a whole", "grpo.group_size"]),
    ],
)
def test_batches_without_an_informative_group_are_no_signal(
    groups: list[RolloutGroup], words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit = Fit(tmp_path)
    for _ in range(4):
        fit.step(groups)
    fit.step([*groups, group([1.0, 0.0])])  # it counts anew from here
    for _ in range(4):
        fit.step(groups)
    assert fit.said == []
    for _ in range(40):
        fit.step(groups)
    assert fit.said == [("no signal", 10)]
    assert fit.rows[0]["number"] == 5
    [record] = caplog.records
    assert [word for word in ["5 batches in a row", *words] if word not in record.getMessage()] == []


def test_no_signal_of_several_kinds_is_called_mixed(tmp_path: Path) -> None:
    fit = Fit(tmp_path)
    for number in range(5):
        fit.step([group([float(number % 2)] * 4)])
    assert "each failed or succeeded as a whole" in fit.rows[0]["says"]


def test_a_reward_of_zero_from_the_start_is_no_signal_and_no_collapse(tmp_path: Path) -> None:
    fit = Fit(tmp_path)
    for _ in range(100):
        fit.step(batch(0.0))
    assert fit.said == [("no signal", 5)]


def test_it_is_said_again_only_after_repeat_after_batches(tmp_path: Path) -> None:
    fit = Fit(tmp_path, health=TrainingHealth(repeat_after=30))
    for _ in range(100):
        fit.step(batch(0.0))
    assert fit.said == [("no signal", 5), ("no signal", 35), ("no signal", 65), ("no signal", 95)]
    assert [row["number"] for row in fit.rows] == [5, 35, 65, 95]


def test_what_comes_and_goes_about_its_threshold_is_not_news_each_time(tmp_path: Path) -> None:
    fit = Fit(tmp_path, health=TrainingHealth(window=4))
    for number in range(120):
        fit.step(batch(0.5), kl=1.0 + 0.4 * (-1) ** (number // 3))  # the mean is above 1 half the time
    assert 0 < len(fit.said) <= 1 + 120 // 4
    fit = Fit(tmp_path / "over", health=TrainingHealth(window=4))
    for kl in [0.1] * 20 + [3.0] * 10 + [0.1] * 20 + [3.0] * 10:
        fit.step(batch(0.5), kl=kl)
    assert [condition for condition, _ in fit.said] == ["far from the reference"] * 2  # it was over in between


# -- what is left alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.1), (0.03, 0.03), (0.5, 0.5), (0.1, 0.8), (0.6, 0.45)])
def test_a_healthy_course_is_left_alone(start: float, end: float, tmp_path: Path) -> None:
    """Sixteen rollouts a batch: the mean over ten batches of a rare success is noise by itself."""
    rng = random.Random(5)
    for fit_number in range(5):
        fit = Fit(tmp_path / str(fit_number), health=TrainingHealth(steps_without_signal=1000))
        for number in range(200):
            share = start + (end - start) * number / 200
            rewards = [[float(rng.random() < share) for _ in range(4)] for _ in range(4)]
            fit.step(
                [group(r, tokens=rng.randint(60, 140), truncated=rng.random() < 0.2) for r in rewards],
                entropy=max(0.3, rng.gauss(1.0 - number / 400, 0.2)), kl=abs(rng.gauss(0.1, 0.1)),
                sampler_mismatch=abs(rng.gauss(0.01, 0.01)),
            )  # fmt: skip
        assert fit.said == []


def test_a_loss_that_falls_with_noise_is_left_alone(tmp_path: Path) -> None:
    rng, fit = random.Random(3), Fit(tmp_path, "sft")
    for number in range(300):
        fit.step(loss_step=2.0 / (1 + number / 50) + abs(rng.gauss(0, 0.3)))
    assert fit.said == []


def test_a_fit_shorter_than_the_window_is_not_judged(tmp_path: Path) -> None:
    fit = Fit(tmp_path)
    for number in range(9):
        fit.step(batch(0.9 / (1 + number), tokens=20 * 4**number if number < 4 else 999, truncated=True),
                 entropy=2.0 / 10**number, kl=9.0, sampler_mismatch=9.0)  # fmt: skip
    assert fit.said == []
    fit.step(batch(0.05, truncated=True), entropy=1e-9, kl=9.0, sampler_mismatch=9.0)
    assert {"truncation", "far from the reference", "sampler mismatch"} == {condition for condition, _ in fit.said}


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_what_is_not_finite_is_left_out(value: float, tmp_path: Path) -> None:
    fit = Fit(tmp_path)
    for _ in range(15):
        fit.step(batch(0.5), entropy=1.0, kl=0.1, sampler_mismatch=0.01)
        fit.step(batch(0.5), entropy=value, kl=value, sampler_mismatch=value)
    assert fit.said == []
    for _ in range(10):
        fit.step(batch(0.5), entropy=value, kl=5.0, sampler_mismatch=value)
    assert [condition for condition, _ in fit.said] == ["far from the reference"]
    loss = Fit(tmp_path / "loss", "sft")
    for number in range(60):
        loss.step(loss_step=value if number % 2 else 1.0)
    loss.step()  # no loss at all
    assert loss.said == []


def test_numbers_of_an_update_that_was_not_made_do_not_count(tmp_path: Path) -> None:
    """A batch without an informative group makes no step, and the metrics still hold those of the step before."""
    fit = Fit(tmp_path)
    fit.step(batch(0.5), kl=50.0)
    fit.stepped = False
    for _ in range(30):
        fit.step(batch(0.5), kl=50.0)
    assert fit.said == []
    fit.stepped = True
    for _ in range(9):
        fit.step(batch(0.5), kl=50.0)
    assert fit.said == [("far from the reference", 40)]


# -- rows, checkpoints, arguments ----------------------------------------------------------------------------------


def test_a_row_says_where_what_how_much_and_what_to_do(tmp_path: Path) -> None:
    fit = Fit(tmp_path)
    fit.trainer.current_epoch = 2
    for _ in range(5):
        fit.step(batch(0.0))
    [row] = fit.rows
    remedy = row.pop("remedy")
    assert row == {
        "stage": "grpo", "epoch": 2, "batch": 4, "step": 5, "condition": "no signal", "number": 5,
        "says": "no group was informative in 5 batches in a row, every rollout failed",
    }  # fmt: skip
    assert "data.train" in remedy


def test_two_conditions_at_once_are_two_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit = Fit(tmp_path)
    for _ in range(15):
        fit.step(batch(0.6), entropy=1.0)
    for _ in range(30):
        fit.step(batch(0.05, tokens=200), entropy=0.01)
    assert sorted(condition for condition, _ in fit.said) == ["entropy collapse", "length blow-up", "reward collapse"]
    assert len(caplog.records) == 3


def course(number: int) -> tuple[list[RolloutGroup], dict[str, float]]:
    """All goes well for thirty batches, then nothing does."""
    if number < 30:
        return batch(0.5 + 0.01 * (number % 7)), {"entropy": 1.0, "kl": 0.1}
    return batch(0.1 if number < 45 else 0.0, tokens=50, truncated=number % 3 > 0), {"entropy": 0.05, "kl": 2.0}


@pytest.mark.parametrize("cut", [1, 12, 33, 36, 48, 90])
def test_a_fit_that_goes_on_warns_as_one_that_was_never_cut_off(cut: int, tmp_path: Path) -> None:
    whole = Fit(tmp_path / "whole", health=TrainingHealth(repeat_after=40))
    for number in range(120):
        groups, metrics = course(number)
        whole.step(groups, **metrics)
    assert len({condition for condition, _ in whole.said}) >= 5
    fit = Fit(tmp_path / "cut", health=TrainingHealth(repeat_after=40))
    for number in range(cut):
        groups, metrics = course(number)
        fit.step(groups, **metrics)
    save_tree(tmp_path / "checkpoint", fit.health.state_dict())  # as a checkpoint keeps it
    after = Fit(tmp_path / "cut", health=TrainingHealth(repeat_after=40))
    after.health.load_state_dict(load_tree(tmp_path / "checkpoint"))
    after.trainer.global_step, after.batches = cut, cut
    for number in range(cut, 120):
        groups, metrics = course(number)
        after.step(groups, **metrics)
    assert after.rows == whole.rows
    assert repr(after.health.state_dict()) == repr(whole.health.state_dict())  # NaN is not equal to itself


def test_the_state_of_a_checkpoint_is_not_that_of_the_live_callback(tmp_path: Path) -> None:
    fit = Fit(tmp_path)
    fit.step(batch(0.0))
    other = TrainingHealth()
    other.load_state_dict(fit.health.state_dict())
    before = json.dumps(other.state_dict())
    fit.step(batch(0.0), kl=9.0)
    assert json.dumps(other.state_dict()) == before


def test_each_fit_begins_anew(tmp_path: Path) -> None:
    health = TrainingHealth()
    first = Fit(tmp_path / "1", health=health)
    for _ in range(20):
        first.step(batch(0.9))
    second = Fit(tmp_path / "2", "grpo", health)
    for _ in range(20):
        second.step(batch(0.1))
    assert first.said == second.said == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"steps_without_signal": 0}, "steps_without_signal must be at least 1"),
        ({"repeat_after": -1}, "repeat_after must be at least 1"),
        ({"length_factor": 0.5}, r"length_factor must be at least 1, got 0\.5"),
        ({"length_factor": NAN}, "length_factor must be at least 1, got nan"),
        ({"loss_factor": 0.0}, "loss_factor must be at least 1"),
        ({"reward_share": 1.5}, "reward_share must be within 0 and 1"),
        ({"entropy_share": -0.1}, "entropy_share must be within 0 and 1"),
        ({"max_truncated": 50}, "max_truncated must be within 0 and 1, got 50"),
        ({"max_truncated": NAN}, "max_truncated must be within 0 and 1"),
        ({"min_entropy": -1.0}, "min_entropy must be at least 0"),
        ({"max_kl": -0.1}, "max_kl must be at least 0"),
        ({"max_mismatch": NAN}, "max_mismatch must be at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"TrainingHealth: {says}"):
        TrainingHealth(**arguments)


def test_a_users_own_health_takes_the_place_of_the_default() -> None:
    default, own, samples = TrainingHealth(), TrainingHealth(window=3), SampleCompletions()
    assert with_callbacks({}, [default]) == [default]
    assert with_callbacks({"callbacks": samples}, [default]) == [default, samples]
    assert with_callbacks({"callbacks": [samples, own]}, [default]) == [samples, own]


def test_a_fit_without_signal_says_so_on_the_screen_and_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    status = main([
        "fit", *SMALL, "--benchmarks=[]", "--curriculum.stages=[grpo]", "--reward=tests.plugins.ProbeOnlyReward",
        "--grpo.prompts_per_step=4", "--trainer.callbacks+=slmreason.callbacks.TrainingHealth",
        "--trainer.callbacks.steps_without_signal=1", f"--run_dir={run}",
    ])  # fmt: skip
    assert status == 0
    rows = [json.loads(line) for line in (run / "round-01" / "grpo" / "health.jsonl").read_text().splitlines()]
    [row] = rows  # the default watch beside the user's would write one more, at its fifth batch
    assert (row["stage"], row["epoch"], row["batch"], row["condition"], row["number"]) == ("grpo", 0, 0, "no signal", 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("grpo: no group was informative in 1 batches in a row, every rollout failed") == 1
    assert "more SFT first" in shown
