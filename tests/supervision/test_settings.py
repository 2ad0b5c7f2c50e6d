"""The bridge section: what is refused, and what needs sampling."""

from __future__ import annotations

from typing import Any

import pytest

from slmreason.supervision.settings import BridgeSettings


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"handover_samples": 0}, "bridge.handover_samples must be at least 1"),
        ({"rationalise": -1}, "bridge.rationalise must be at least 0"),
        ({"temperature": 0.0}, "bridge.temperature must be above 0"),
        ({"max_sampled_tokens": 0}, "bridge.max_sampled_tokens must be at least 1"),
        ({"select": False, "raw": "last"}, "bridge.raw: last does nothing"),
        ({"handover": False, "handover_search": True}, "bridge.handover_search: true does nothing"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        BridgeSettings(**values)


def test_nothing_is_sampled_unless_it_is_asked_for() -> None:
    assert not BridgeSettings().samples
    assert BridgeSettings(handover_search=True).samples
    assert BridgeSettings(rationalise=1).samples
    assert not BridgeSettings(rationalise=1, select=False).samples
