"""The settings of the three fits: which keys there are, their defaults, and what is refused."""

from __future__ import annotations

import re
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
SHARED = ["learning_rate", "epochs", "weight_decay", "warmup_steps", "decay", "optimizer", "max_skipped_steps"]
SUPERVISED = ["loss", "psft_steps", "psft_clip"]


@pytest.mark.parametrize("settings", ALL)
def test_the_keys_of_a_config_are_the_fields_with_their_defaults(settings: type[Any]) -> None:
    config = parse(build_parser("fit", ""), ["--seed_everything=0"])
    assert config[settings.stage].as_dict() == asdict(settings())


@pytest.mark.parametrize("settings", [SFTSettings, CFTSettings])
def test_sft_and_cft_have_the_shared_settings_alone(settings: type[Any]) -> None:
    assert [field.name for field in fields(settings)] == SHARED + SUPERVISED


def test_sft_and_cft_differ_in_learning_rate_and_epochs() -> None:
    sft, cft = asdict(SFTSettings()), asdict(CFTSettings())
    differing = {key: (sft[key], cft[key]) for key in SHARED + SUPERVISED if sft[key] != cft[key]}
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss": "cispo", "clip_low": 0.1}, "grpo.clip_low: 0.1 does nothing with grpo.loss cispo"),
        ({"loss": "sapo", "clip_high": 0.2}, "grpo.clip_high: 0.2 does nothing with grpo.loss sapo"),
        ({"cispo_cap": 2.0}, "grpo.cispo_cap: 2.0 does nothing with grpo.loss grpo"),
        ({"loss": "gmpo", "sapo_temperature_pos": 2.0}, "grpo.sapo_temperature_pos: 2.0 does nothing with grpo.loss"),
        ({"sapo_temperature_neg": 2.0}, "grpo.sapo_temperature_neg: 2.0 does nothing with grpo.loss grpo"),
        ({"mask_mismatch_above": 2.0}, "grpo.mask_mismatch_above: 2.0 does nothing without grpo.mask_mismatch"),
        ({"mask_mismatch": "token", "importance_cap": 3.0}, "grpo.importance_cap: 3.0 does nothing with grpo.mask"),
        ({"loss": "cispo", "cispo_cap": 0.0}, "grpo.cispo_cap must be above 0, got 0.0"),
        ({"loss": "sapo", "sapo_temperature_neg": 0.0}, "grpo.sapo_temperature_neg must be above 0, got 0.0"),
        ({"mask_mismatch": "token", "mask_mismatch_above": 0.0}, "grpo.mask_mismatch_above must be above 0, got 0.0"),
        ({"entropy_bonus": -0.1}, "grpo.entropy_bonus must be at least 0, got -0.1"),
        ({"entropy_bonus": 0.1, "top_p": 0.9}, "grpo.entropy_bonus: 0.1 needs grpo.top_p of 1, got 0.9"),
        ({"overlong_cache": 0}, "grpo.overlong_cache must be from 1 to grpo.max_completion_tokens (512), got 0"),
        ({"overlong_cache": 513}, "grpo.overlong_cache must be from 1 to grpo.max_completion_tokens (512), got 513"),
        ({"overlong_cache": 9, "advantage_scale": "maxrl"}, "grpo.overlong_cache: 9 makes rewards negative"),
        ({"order": "hardest"}, "grpo.order must be one of file, random, informative, easy_first or a class, got 'hard"),
        ({"order": "informative", "cooldown": -1}, "grpo.cooldown must be at least 0, got -1"),
        ({"order": "file", "cooldown": 2}, "grpo.cooldown: 2 does nothing with grpo.order file"),
        ({"max_sampled_groups": 16}, "grpo.max_sampled_groups must be above grpo.prompts_per_step (16), got 16"),
    ],
    ids=str,
)  # fmt: skip
def test_objectives_of_grpo_that_do_not_go_together_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        GRPOSettings(**options)


@pytest.mark.parametrize("settings", [SFTSettings, CFTSettings])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"psft_steps": 8}, "psft_steps: 8 does nothing with {}.loss nll"),
        ({"loss": "dft", "psft_clip": 0.1}, "psft_clip: 0.1 does nothing with {}.loss dft"),
        ({"loss": "psft", "psft_steps": 1}, "psft_steps must be at least 2 (with 1 psft is nll), got 1"),
        ({"loss": "psft", "psft_clip": 0.0}, "psft_clip must be above 0, got 0.0"),
    ],
    ids=str,
)  # fmt: skip
def test_objectives_of_sft_and_cft_that_do_not_go_together_are_refused(
    settings: type[Any], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=f"^{settings.stage}.{re.escape(says.format(settings.stage))}"):
        settings(**options)


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
