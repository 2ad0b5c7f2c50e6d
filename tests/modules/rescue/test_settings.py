"""The `grpo.rescue` section: what is on by default, and what is refused."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest

from slmreason.cli.config import build_parser, parse
from slmreason.cli.errors import ConfigError
from slmreason.modules import GRPOSettings, RescueSettings


def test_nothing_is_rescued_by_default() -> None:
    assert GRPOSettings().rescue == RescueSettings(kind=None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": 3}, "grpo.rescue.samples: 3 does nothing with grpo.rescue.kind null"),
        ({"kind": "sft_gate", "mu": 0.1}, "grpo.rescue.mu: 0.1 does nothing with grpo.rescue.kind sft_gate"),
        ({"kind": "chord", "sft_weight": 2.0}, "grpo.rescue.sft_weight: 2.0 does nothing with grpo.rescue.kind chord"),
        ({"kind": "chord", "max_sampled_tokens": 9}, "grpo.rescue.max_sampled_tokens: 9 does nothing with grpo.rescue"),
        ({"kind": "handover", "mu_end": 0.0}, "grpo.rescue.mu_end: 0.0 does nothing with grpo.rescue.kind handover"),
        ({"kind": "handover", "samples": 0}, "grpo.rescue.samples must be at least 1, got 0"),
        ({"kind": "handover", "max_sampled_tokens": 0}, "grpo.rescue.max_sampled_tokens must be at least 1, got 0"),
        ({"kind": "sft_gate", "sft_weight": 0.0}, "grpo.rescue.sft_weight must be above 0, got 0.0"),
        ({"kind": "chord", "mu": 1.5}, "grpo.rescue.mu must be within 0 and 1, got 1.5"),
        ({"kind": "chord", "mu_end": -0.1}, "grpo.rescue.mu_end must be within 0 and 1, got -0.1"),
        ({"kind": "chord", "mu": 0.0, "mu_end": 0.0}, "grpo.rescue.mu and grpo.rescue.mu_end: with 0 for both"),
    ],
    ids=str,
)
def test_what_is_out_of_range_or_does_nothing_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        RescueSettings(**options)


def test_a_search_that_samples_more_than_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^grpo\.rescue\.samples must be at most grpo\.group_size \(4\), got 5$"):
        GRPOSettings(group_size=4, rescue=RescueSettings("handover", samples=5))
    assert GRPOSettings(group_size=4, rescue=RescueSettings("handover", samples=4)).rescue.samples == 4


def test_the_keys_are_those_of_a_config() -> None:
    parser = build_parser("fit", "")
    config = parse(parser, ["--grpo.rescue.kind=chord", "--grpo.rescue.mu=0.25"])
    assert config.grpo.rescue.as_dict() == asdict(RescueSettings("chord", mu=0.25))
    with pytest.raises(ConfigError, match=r"grpo\.rescue\.kind"):
        parse(parser, ["--grpo.rescue.kind=teacher"])
