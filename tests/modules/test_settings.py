"""The settings of the three fits: which keys there are, their defaults, and what is refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import pytest

from slmreason.cli.config import build_parser, parse
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.settings import CFTSettings, FitSettings, GRPOSettings, SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward

ALL = [SFTSettings, CFTSettings, GRPOSettings]
SHARED = ["learning_rate", "epochs", "weight_decay", "warmup_steps", "decay", "max_skipped_steps"]


@pytest.mark.parametrize("settings", ALL)
def test_the_keys_of_a_config_are_the_fields_with_their_defaults(settings: type[Any]) -> None:
    config = parse(build_parser("fit", ""), ["--seed_everything=0"])
    assert vars(config[settings.stage]) == asdict(settings())


@pytest.mark.parametrize("settings", [SFTSettings, CFTSettings])
def test_sft_and_cft_have_the_shared_settings_alone(settings: type[Any]) -> None:
    assert [field.name for field in fields(settings)] == SHARED


def test_sft_and_cft_differ_in_learning_rate_and_epochs() -> None:
    sft, cft = asdict(SFTSettings()), asdict(CFTSettings())
    differing = {key: (sft[key], cft[key]) for key in SHARED if sft[key] != cft[key]}
    assert differing == {"learning_rate": (1e-5, 5e-6), "epochs": (2, 1)}


@pytest.mark.parametrize("settings", ALL)
@pytest.mark.parametrize(
    "wrong", [{"learning_rate": 0.0}, {"epochs": 0}, {"warmup_steps": -1}, {"weight_decay": -0.1}], ids=str
)
def test_a_shared_setting_out_of_range_is_refused_with_its_stage(settings: type[Any], wrong: dict[str, Any]) -> None:
    [(key, value)] = wrong.items()
    with pytest.raises(ValueError, match=rf"^{settings.stage}: needs .*{key} .*got .*{value}"):
        settings(**wrong)


@pytest.mark.parametrize("settings", ALL)
def test_a_fit_that_may_skip_no_step_is_refused(settings: type[Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{settings.stage}\.max_skipped_steps must be at least 1, got 0$"):
        settings(max_skipped_steps=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("prompts_per_step", 0), ("max_completion_tokens", 0), ("updates_per_batch", 0), ("group_size", 1),
     ("temperature", 0.0)],
)  # fmt: skip
def test_a_setting_of_grpo_out_of_range_is_refused_with_its_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^grpo\.{key}\b"):
        GRPOSettings(**{key: value})


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        SFTSettings().epochs = 3  # type: ignore[misc]


def test_a_module_has_the_settings_that_it_is_given(student: Student) -> None:
    given = GRPOSettings(group_size=4)
    module = GRPOModule(student, HFEngine(), AnswerReward(), given)
    assert module.settings is given


def test_a_module_without_settings_has_those_of_its_own_stage(student: Student) -> None:
    made: list[FitSettings] = [
        SFTModule(student).settings,
        CFTModule(student).settings,
        GRPOModule(student, HFEngine(), AnswerReward()).settings,
    ]
    assert made == [SFTSettings(), CFTSettings(), GRPOSettings()]
