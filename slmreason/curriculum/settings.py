"""What a run is made of: rounds and stages, how rho is measured, how often it is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from slmreason.curriculum.waves import StoppingRule
from slmreason.data.strata import Bands
from slmreason.records import Place

StageName = Literal["sft", "grpo", "cft"]
CERTAIN = 0.9
"""Probability of a band, where nothing else is said, with which a problem needs no rollouts."""
MOST_PARTS = 4
"""Of the budget; the first round is taken for one of them where there are more rounds."""


@dataclass
class ProbeSettings:
    """How rho is measured outside GRPO. Rollouts are drawn as GRPO draws them."""

    attempts: int = 8
    """Rollouts of each problem: the k of the method."""
    refresh: Literal["stale", "unsolved", "missing", "never"] = "stale"
    """What is measured before a stage. `stale`: before GRPO what is not evidence of the student as it stands, before
    SFT only what is older than the last GRPO fit, whose rollouts count for free. `missing`: problems never sampled.
    `unsolved`: those, and before GRPO what no rollout solved before the SFT fit: GRPO itself measures the others.
    `never`: nothing; then `data.routing` must be `all`, or there must be `data.evidence`."""
    epoch_share: float = 1.0
    """Share of the pool that is measured again at the end of each SFT epoch; 0 for none."""
    waves: list[int] | None = None
    """Rollouts of a problem in waves of these sizes, together `attempts`, such as [5, 1, 1, 1]: a problem whose band no
    further rollout can change is left out of the next wave, so bands are those of all rollouts. With the default bands
    none of 8 is known before the fifth. All at once when not given."""
    screen: bool = False
    """A problem is left out of the next wave too once at least half of its rollouts are in, all right or all wrong,
    such as 4 of 8 after the waves [4, 4]: fewer rollouts, and a few bands that all of them would have put elsewhere."""
    share: float | None = None
    """Measuring outside GRPO takes at most this share, such as 0.15, of the tokens that the run has taken when a round
    ends: as many again as the round before took, in the first round `curriculum.max_tokens` divided by the rounds (by 4
    where there are more). What is least known is measured first; what was never measured for want of tokens is in no
    band. No bound when not given."""
    predictor: Literal["none", "forward"] = "none"
    """What is known of a problem before its rollouts. `forward`: how likely the student finds the trace that came with
    it, by one forward pass, gives it a prior of its own, fitted to the problems that are sampled first. Where it makes
    a band certain there are no rollouts. Where it does not predict held-out problems (rank correlation below 0.2) it is
    switched off, which is said. It needs `data.bands.evidence_model: posterior`."""
    certain: float | None = None
    """With a predictor: a problem whose band has at least this probability is not sampled, or not further; 0.9 when not
    given."""

    @property
    def least_certainty(self) -> float:
        """See `certain`."""
        return CERTAIN if self.certain is None else self.certain

    def check(self, bands: Bands) -> None:
        """
        Raises:
            ValueError: these bands leave a key without effect, or no wave of a probe could ever be left out.
        """
        if self.predictor != "none" and bands.evidence_model != "posterior":
            raise ValueError(
                "curriculum.probe.predictor: bands by the newest evidence have no prior; it needs "
                "data.bands.evidence_model: posterior"
            )
        if self.waves is not None and self.predictor == "none":
            StoppingRule(self.attempts, bands, self.screen).check(self.waves)

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 <= self.epoch_share <= 1:
            raise ValueError("curriculum.probe: attempts must be at least 1 and epoch_share within 0 and 1")
        if self.waves is not None and (not self.waves or min(self.waves) < 1 or sum(self.waves) != self.attempts):
            raise ValueError(
                f"curriculum.probe.waves: {self.waves} must be at least 1 each, and together curriculum.probe.attempts "
                f"({self.attempts})"
            )
        if self.screen and self.waves is None:
            raise ValueError(
                "curriculum.probe.screen: there is nothing to stop before; it needs curriculum.probe.waves"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"curriculum.probe.share must be above 0 and at most 1, got {self.share}")
        if self.certain is not None and self.predictor == "none":
            raise ValueError("curriculum.probe.certain: nothing is certain without curriculum.probe.predictor: forward")
        if not 0.5 <= self.least_certainty < 1:
            raise ValueError(f"curriculum.probe.certain must be at least 0.5 and below 1, got {self.certain}")


@dataclass
class CheckpointSettings:
    """How often a fit can be gone on with after a crash. After each stage there is a checkpoint in any case."""

    every_n_steps: int | None = None
    """Optimizer steps between two checkpoints."""
    every_minutes: float | None = 10.0
    """Minutes between two checkpoints; with `every_n_steps` too, whichever comes first."""
    keep: int = 2
    """The newest checkpoints that are kept, beside the newest after a stage."""
    chunk: int | None = None
    """Problems that are measured, bridged or critiqued at a time: what has been done is noted after each chunk. When
    not given, as many as fill the rollout engine once, and after a batch of probes or benchmarks that took longer than
    90 seconds half as many, down to a quarter. A batch is cut no smaller, since small ones decode slowly, and bridged
    problems are not cut at all, since they share `bridge.max_sampled_tokens`."""

    def __post_init__(self) -> None:
        if min(self.keep, self.chunk or 1, self.every_n_steps or 1) < 1 or (self.every_minutes or 1) <= 0:
            raise ValueError(
                "curriculum.checkpoint: keep, chunk and every_n_steps must be at least 1, every_minutes > 0"
            )


@dataclass
class CurriculumSettings:
    """Which fits a run has."""

    rounds: int = 2
    """Rounds of the stages."""
    stages: list[StageName] = field(default_factory=lambda: ["sft", "grpo", "cft"])
    """The stages of a round, in order; none measures the base alone."""
    max_tokens: int | None = None
    """The run ends with the optimizer step at which its tokens, sampled, trained on and written by the teacher, reach
    this, whatever rounds and epochs are left. SFT makes traces for as many problems as it can then train on too.
    Benchmarks are not counted."""
    budgets: list[int] | None = None
    """Tokens, ascending, such as [100000, 200000, 400000]: the benchmarks are run too at the first optimizer step at
    which the run's tokens reach each of them, for a curve of accuracy against tokens. The last may be `max_tokens`."""
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    """How rho is measured."""
    mix_critiques: bool = False
    """Put the critique records of the round before into the SFT fit too, beside or in place of a CFT stage."""
    evaluate: Literal["stage", "round", "ends"] = "stage"
    """When the benchmarks are run: after every stage, after every round, or before the first and after the last."""
    keep: Literal["last", "best"] = "last"
    """The student that a stage hands on: `last` is the one that its fit ended with; `best` is that or the one that the
    stage began with, whichever does better on the problems of `data.holdout` or `data.validation`."""
    keep_by: dict[str, str] | None = None
    """By which metric `best` compares after a stage, such as {sft: val/pass@8}. When not given, pass@k with the k of
    `validation.samples` after SFT, and val/pass@1 after GRPO and CFT."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """How often the run is saved."""

    @property
    def places(self) -> list[Place]:
        """All stages of a run, in their order."""
        rounds = range(1, self.rounds + 1)
        return [Place(number, name) for number in rounds for name in self.stages]

    def probe_tokens(self, ended: Sequence[int]) -> float:
        """Tokens that measuring outside GRPO may have taken, since the run began, by the end of a round.

        A round is taken to be as long as the one before it. How long the first one is nobody knows: it is taken for its
        part of the budget, and for a quarter of it where there are more than four rounds, since `rounds: 1000` means
        round after round until the budget is spent.

        Args:
            ended: what the run had taken at the end of each earlier round, in their order.
        """
        assert self.probe.share is not None
        assert self.max_tokens is not None
        if not ended:
            return self.probe.share * self.max_tokens / min(self.rounds, MOST_PARTS)
        before = ended[-2] if len(ended) > 1 else 0
        return self.probe.share * min(self.max_tokens, 2 * ended[-1] - before)

    def __post_init__(self) -> None:
        if self.rounds < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ValueError("curriculum: rounds and max_tokens must be at least 1")
        if self.keep_by is not None and self.keep == "last":
            raise ValueError("curriculum.keep_by: nothing is compared unless curriculum.keep is best")
        if unknown := set(self.keep_by or {}) - set(get_args(StageName)):
            raise ValueError(f"curriculum.keep_by: there is no stage {min(unknown)}")
        if self.budgets is not None:
            self._check_budgets(self.budgets)
        if self.probe.share is not None and self.max_tokens is None:
            raise ValueError(
                "curriculum.probe.share: a round's tokens are known only where curriculum.max_tokens is set"
            )

    def _check_budgets(self, budgets: list[int]) -> None:
        if not budgets or budgets[0] < 1 or budgets != sorted(set(budgets)):
            raise ValueError(f"curriculum.budgets: {budgets} must be numbers of tokens from 1 on, each above the last")
        if self.max_tokens is not None and budgets[-1] > self.max_tokens:
            raise ValueError(
                f"curriculum.budgets: the run ends at curriculum.max_tokens ({self.max_tokens}), before {budgets[-1]}"
            )
