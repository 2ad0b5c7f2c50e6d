"""`reward` as a list of terms: what a config may say, and a run with a function from a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import EarlyStopping

from slmreason.cli import main
from slmreason.cli.config import build_parser, instantiate, parse
from slmreason.cli.errors import ConfigError
from slmreason.cli.python import as_arguments
from slmreason.cli.rewards import reward_from
from slmreason.curriculum.trainer_flags import refuse_callbacks
from slmreason.curriculum.watched import Logged
from slmreason.modules.grpo import GRPOModule
from slmreason.rollout.transformers import HFEngine
from slmreason.run.folder import RunFolder
from slmreason.student import Student
from slmreason.verify.functions import RewardFunction
from slmreason.verify.rewards import AnswerReward, RewardFn
from slmreason.verify.terms import RewardTerms, WeightedFunction

FUNCTIONS = '''
from pathlib import Path

STOP = Path("stop")


def brevity(completions, **kwargs):
    return [-float(len(text)) for text in completions]


def of_hard_ones(completions, level, trainer_state, log_metric, **kwargs):
    """Stops the run once, as a person would from the keyboard."""
    if STOP.exists() and trainer_state.global_step == 2:
        STOP.unlink()
        raise KeyboardInterrupt
    log_metric("planned", trainer_state.max_steps)
    return [None if each == "easy" else 1.0 for each in level]
'''
REWARD = [
    {"class_path": "AnswerReward", "init_args": {"format_weight": 0.5}, "weight": 2},
    {"fn": "functions.py:brevity", "weight": 0.01},
    {"fn": "functions.py:of_hard_ones", "name": "hard"},
]
SMALL = ["--config=quickstart", "--config=rewards.yaml", "--data.train=rows.jsonl", "--curriculum.probe.attempts=4",
         "--curriculum.rounds=1", "--curriculum.stages=[grpo]", "--grpo.prompts_per_step=4", "--grpo.group_size=4",
         "--curriculum.evaluate=ends", "--curriculum.checkpoint.every_n_steps=1", "--trainer.accelerator=cpu",
         "--benchmarks=[embedded:chain/test?count=4]", "--trainer.enable_progress_bar=false",
         "--data.routing=all"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with functions, rows that have a column for one of them, and a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump({"reward": REWARD}))
    rows = [{"question": f"Ann has {n} pens and buys {n + 1} more. How many pens has she now?",
             "answer": str(2 * n + 1), "level": "easy" if n % 2 else "hard"} for n in range(2, 26)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def logged(run: Path, name: str) -> list[float]:
    with open(run / "round-01" / "grpo" / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture
def _no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmreason.runtime.preemption.listen", lambda: None)


@pytest.mark.usefixtures("_no_handlers")
def test_a_run_with_functions_from_a_file_goes_on_as_if_never_cut_off(folder: Path) -> None:
    assert main(["fit", *SMALL, "--run_dir=whole"]) == 0
    (folder / "stop").touch()
    assert main(["fit", *SMALL, "--run_dir=cut"]) == 130
    assert not (folder / "stop").exists()
    assert main(["fit", "--resume=cut"]) == 0
    whole, cut = RunFolder(folder / "whole"), RunFolder(folder / "cut")
    for name in ("metrics.csv", "samples.jsonl"):
        first, second = (each.path / "round-01" / "grpo" / name for each in (whole, cut))
        assert first.read_text() == second.read_text()
    for column in ("AnswerReward", "brevity", "hard", "planned"):
        assert logged(folder / "whole", f"grpo/reward/{column}_step")
    for line in (whole.path / "round-01" / "grpo" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        hard = sample["reward/hard"] or 0.0
        parts = 2 * sample["reward/AnswerReward"] + 0.01 * sample["reward/brevity"] + hard
        assert sample["reward"] == pytest.approx(parts)
        assert sample["reward/brevity"] == -len(sample["completion"])
    assert "level" not in (whole.path / "config.yaml").read_text()
    assert yaml.safe_load((whole.path / "config.yaml").read_text())["reward"] == REWARD


def test_a_bad_function_ends_a_command_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "functions.py").write_text(
        "def brevity(completions, **kwargs):\n    return [float('nan')] * len(completions)\n"
    )
    args = [*SMALL, "--run_dir=bad", '--reward=[{"fn": "functions.py:brevity"}]']
    assert main(["fit", *args]) == 2
    shown = capsys.readouterr().err
    assert "error: reward: functions.py:brevity: the value of a completion of rows.jsonl-000000 is nan" in shown
    assert "Traceback" not in shown
    assert not (folder / "bad").exists()


def made(*args: str) -> Any:
    parser = build_parser("fit", "")
    return instantiate(parser, parse(parser, ["--config=quickstart", *args])).reward


def test_a_reward_may_be_a_class_or_a_list(folder: Path) -> None:
    assert type(made()) is AnswerReward
    assert made("--reward.format_weight=0.1").format_weight == 0.1
    several = made("--config=rewards.yaml", "--normalize_rewards=true")
    assert isinstance(several, RewardTerms)
    assert (several.names, several.weights) == (("AnswerReward", "brevity", "hard"), (2.0, 0.01, 1.0))
    assert several.normalize
    assert isinstance(several.verifier, AnswerReward)
    assert several.verifier.format_weight == 0.5


def test_a_list_stands_in_python_too(folder: Path) -> None:
    assert made(*as_arguments({"reward": REWARD})).names == ("AnswerReward", "brevity", "hard")


def test_without_a_class_answers_decide_what_is_correct_and_count_nothing(folder: Path) -> None:
    reward = made('--reward=[{"fn": "functions.py:brevity"}]')
    assert isinstance(reward.verifier, AnswerReward)
    assert reward.weights == (0.0, 1.0)


def test_data_sets_keep_their_own_verifiers_beside_functions(folder: Path) -> None:
    entry = '--data.train=[{"path": "mine=rows.jsonl", "reward": "tests.plugins.CoinReward"}]'
    reward = made("--config=rewards.yaml", entry)
    assert reward.names == ("AnswerReward", "brevity", "hard")
    assert type(reward.verifier).__name__ == "RewardBySource"


REFUSED: dict[str, tuple[str, str]] = {
    "two classes": (
        '["AnswerReward", "tests.plugins.CoinReward"]',
        "AnswerReward and CoinReward both say what is correct",
    ),
    "empty": ("[]", "an empty list has no term"),
    "unknown key": ('[{"fn": "functions.py:brevity", "wieght": 1}]', "brevity does not accept wieght; there are"),
    "type": (
        '[{"fn": "functions.py:brevity", "weight": "x"}]',
        "weight of the term functions.py:brevity takes a number",
    ),
    "not finite": ('[{"fn": "functions.py:brevity", "weight": .inf}]', "brevity: weight must be finite"),
    "no class": ('["nowhere.Reward"]', "Problem with given class_path 'nowhere.Reward': No module named 'nowhere'"),
    "no such class": ('["NoReward"]', "reward: there is no class NoReward; it takes one of: AnswerReward, "),
    "argument": ('[{"class_path": "AnswerReward", "init_args": {"format": 1}}]', "Option 'format' is not accepted"),
    "no term": ('[{"weight": 1}]', "weight is no argument of its class, or has a value that it does not take"),
    "no function": ('[{"fn": "functions.py:long"}]', "reward: fn: functions.py:long: AttributeError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_list_that_is_no_reward_is_refused(name: str, folder: Path) -> None:
    given, says = REFUSED[name]
    with pytest.raises(ValueError, match=r"^reward: ") as caught:
        made(f"--reward={given}")
    assert says in str(caught.value)


def test_one_class_cannot_be_normalised() -> None:
    with pytest.raises(ConfigError, match="normalize_rewards: reward is a single class"):
        reward_from(AnswerReward(), normalize=True)


def logged_with(reward: RewardFn) -> dict[str, Logged]:
    """What GRPO logs of a reward."""
    return {"grpo": Logged.of(GRPOModule(Student("embedded:qwen2"), HFEngine(), reward))}


def test_a_callback_may_watch_a_term_that_there_is(folder: Path) -> None:
    terms = logged_with(made('--reward=["AnswerReward", {"fn": "functions.py:brevity"}]'))
    for name in ("brevity", "brevity_epoch", "AnswerReward_step"):
        refuse_callbacks([EarlyStopping(f"grpo/reward/{name}")], terms, has_logger=True)
    with pytest.raises(ValueError, match=r"no term of reward has that name\); there are .*, grpo/reward/brevity"):
        refuse_callbacks([EarlyStopping("grpo/reward/brewity")], terms, has_logger=True)
    with pytest.raises(ValueError, match="watches sft/reward/brevity, and there is no sft in curriculum.stages"):
        refuse_callbacks([EarlyStopping("sft/reward/brevity")], terms, has_logger=True)


def test_a_function_that_logs_may_log_under_any_name(caplog: pytest.LogCaptureFixture) -> None:
    def logs(completions: list[str], log_metric: Callable[[str, float], None]) -> list[float]:
        log_metric("length", 1.0)
        return [0.0] * len(completions)

    terms = RewardTerms(AnswerReward(), [WeightedFunction(RewardFunction(logs, "logs", "here"))])
    with caplog.at_level("INFO", logger="slmreason"):
        refuse_callbacks([EarlyStopping("grpo/reward/length")], logged_with(terms), has_logger=True)
    assert "whether it is logged is known in the fit alone" in caplog.text
