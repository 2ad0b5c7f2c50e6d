"""A probe in waves stops where the band is known: proven by going through all that eight rollouts can come to."""

from __future__ import annotations

from itertools import accumulate, product

import pytest

from slmreason.curriculum.waves import StoppingRule
from slmreason.data.strata import Bands

BANDS = [Bands(), Bands(simple=0.6, medium=0.3), Bands(simple=1.0, medium=0.5), Bands(simple=0.75, medium=0.01)]


def in_waves(outcomes: tuple[bool, ...], rule: StoppingRule, waves: list[int]) -> tuple[int, int]:
    """(right, drawn) when the rollouts come in these waves."""
    for drawn in accumulate(waves):
        right = sum(outcomes[:drawn])
        if rule.stops(right, drawn):
            return right, drawn
    raise AssertionError("no problem is left after the last wave")


@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.parametrize("attempts", [1, 2, 3, 5, 8, 9])
def test_stopping_early_never_changes_a_band(bands: Bands, attempts: int) -> None:
    rule = StoppingRule(attempts, bands, screen=False)
    for outcomes in product([False, True], repeat=attempts):
        right, drawn = in_waves(outcomes, rule, [1] * attempts)
        assert bands.of(right / drawn) == bands.of(sum(outcomes) / attempts)


@pytest.mark.parametrize("bands", BANDS)
def test_no_problem_is_asked_more_than_its_band_needs(bands: Bands) -> None:
    rule, attempts = StoppingRule(8, bands, screen=False), 8
    for drawn in range(attempts):
        for right in range(drawn + 1):
            futures = {bands.of((right + more) / attempts) for more in range(attempts - drawn + 1)}
            assert rule.stops(right, drawn) == (len(futures) == 1)


def test_eight_rollouts_stop_by_the_rule_of_the_method() -> None:
    rule = StoppingRule(8, Bands(), screen=False)
    for drawn in range(8):
        for right in range(drawn + 1):
            wrong = drawn - right
            assert rule.stops(right, drawn) == (right >= 6 or wrong >= 7 or (right >= 2 and wrong >= 3))


def test_the_screen_stops_at_half_where_all_agree() -> None:
    rule = StoppingRule(8, Bands(), screen=True)
    assert [rule.stops(right, 4) for right in range(5)] == [True, False, False, False, True]
    assert not rule.stops(0, 3)


@pytest.mark.parametrize("waves", [[2, 2, 4], [4, 4], [8]])
def test_waves_that_can_never_be_left_out_are_refused(waves: list[int]) -> None:
    with pytest.raises(ValueError, match=r"curriculum\.probe\.waves: .* use \[5, 1, 1, 1\], or curriculum\.probe\.scr"):
        StoppingRule(8, Bands(), screen=False).check(waves)


@pytest.mark.parametrize(("waves", "screen"), [([5, 1, 1, 1], False), ([6, 2], False), ([2, 2, 4], True)])
def test_waves_that_may_be_left_out_are_taken(waves: list[int], screen: bool) -> None:
    StoppingRule(8, Bands(), screen).check(waves)
