"""How two configs differ: a run goes on by the one it was begun with, but for keys that may change."""

from __future__ import annotations

import re
from typing import Any

MAY_CHANGE = re.compile(
    r"(?:config\.)?(?:run_dir|curriculum\.checkpoint\.(?:every_n_steps|every_minutes|keep)"
    r"|trainer\.(?:max_time|enable_progress_bar)|teacher\.init_args\."
    r"(?:max_requests|max_tokens|concurrency|max_retries|timeout_s|answers|input_price|output_price))"
)
"""Keys that may change when a run or a step goes on: where and how long, and what a teacher may cost."""


GROWS = re.compile(r"curriculum\.max_tokens")
"""Keys that may change besides when one run goes on; runs that are compared must have the same."""


def differing_keys(before: Any, now: Any, free: re.Pattern[str] | None = None) -> list[str]:
    """Which keys of two configs differ, but for those in `MAY_CHANGE` and `free`, with the first one's values."""
    old, new = flat(before), flat(now)
    keys = sorted(
        key
        for key in old.keys() | new.keys()
        if old.get(key) != new.get(key) and not MAY_CHANGE.fullmatch(key) and not (free and free.fullmatch(key))
    )
    return [f"{keys[0]} ({old.get(keys[0])!r} then, {new.get(keys[0])!r} now)", *keys[1:]] if keys else []


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as `{"student.lora.r": 8, ...}`."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }
