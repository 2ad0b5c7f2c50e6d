"""When the rollouts of a problem are enough: a probe in waves stops where more of them cannot change its band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from slmreason.data.strata import Bands


@dataclass(frozen=True)
class StoppingRule:
    """Whether a problem needs another wave."""

    attempts: int
    """Rollouts of a problem that is not stopped: the k of the method."""
    bands: Bands
    screen: bool
    """Half of the rollouts, all right or all wrong, are enough too."""

    def stops(self, right: int, drawn: int) -> bool:
        """Whether a problem with so many right of the rollouts drawn so far is done with.

        Without the screen that changes no band: the rate of the drawn ones lies between the lowest and the highest that
        all of them could come to, and these are in one band.
        """
        left = self.attempts - drawn
        if left <= 0 or (self.screen and 2 * drawn >= self.attempts and right in (0, drawn)):
            return True
        lowest, highest = right / self.attempts, (right + left) / self.attempts
        return self.bands.of(lowest) == self.bands.of(highest)

    def check(self, waves: Sequence[int]) -> None:
        """
        Raises:
            ValueError: no problem could ever stop after one of these waves but the last.
        """
        for drawn in list(accumulate(waves))[:-1]:
            if any(self.stops(right, drawn) for right in range(drawn + 1)):
                return
        first = next((n for n in range(1, self.attempts) if any(self.stops(r, n) for r in range(n + 1))), None)
        if first is None:
            raise ValueError(f"curriculum.probe.waves: with {self.attempts} attempts no band is known before the last")
        raise ValueError(
            f"curriculum.probe.waves: {list(waves)} never stop early, since with {self.attempts} attempts no band is "
            f"known before {first} of them: use {[first] + [1] * (self.attempts - first)}, or curriculum.probe.screen"
        )
