"""What a run needs to know to go on, and what became of each of its stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slmreason.curriculum.bought import Bought
from slmreason.curriculum.predictor import Prediction
from slmreason.evaluate.benchmarks import Score
from slmreason.records import Band, Critique, Place, Tokens, from_json, to_json
from slmreason.run.loggers import Axis
from slmreason.student import Student


@dataclass
class StageReport:
    """What became of one stage."""

    place: Place
    outcome: str
    """`done`, or why it was skipped."""
    seconds: float
    rows: int
    scores: list[Score]
    tokens: Tokens = field(default_factory=Tokens)
    """What the run had cost when the stage ended."""
    benchmark_seconds: float = 0.0
    """What the benchmarks after the stage took."""
    benchmark_tokens: int = 0
    """Tokens that the student answered them with."""
    validated: dict[str, float] = field(default_factory=dict)
    """What the stage's student came to on the held-out problems: `val/kl`, and `val/pass@k` where it was compared."""
    kept: str = ""
    """Where students are compared: whether the stage hands on its `new` student or the one of `before`."""

    def describe(self, tokens: int) -> str:
        """The line that says what the stage came to.

        Args:
            tokens: that it cost.
        """
        said = [f"{self.place.label}: {self.outcome}"]
        if self.place.stage != "base":
            said.append(f"{self.seconds:.0f} s, {tokens} tokens")
        if self.validated:
            said.append(" ".join(f"{name} {value:.3f}" for name, value in self.validated.items()))
        if self.scores:
            said.append(" ".join(f"{score.benchmark} {100 * score.value:.1f}" for score in self.scores))
            said.append(f"benchmarks {self.benchmark_seconds:.0f} s, {self.benchmark_tokens} tokens")
        return " | ".join(said)

    def as_summary(self) -> dict[str, Any]:
        """Its entry in summary.json."""
        return {
            "stage": self.place.label,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 1),
            "rows": self.rows,
            "tokens": self.tokens.as_summary(),
            "scores": [asdict(score) for score in self.scores],
            "benchmark_seconds": round(self.benchmark_seconds, 1),
            "benchmark_tokens": self.benchmark_tokens,
            **({"validated": self.validated} if self.validated else {}),
            **({"kept": self.kept} if self.kept else {}),
        }


@dataclass
class RunState:
    """What the run needs to know to go on, beside the student's weights and the files of the run."""

    reports: list[StageReport] = field(default_factory=list)
    policy_version: int = 0
    last_grpo_began: int | None = None
    """Policy version at which the newest GRPO fit began."""
    elapsed: float = 0.0
    """Seconds that the run has taken, over all its processes in time."""
    critiques: list[Critique] = field(default_factory=list)
    bands: dict[str, Band] = field(default_factory=dict)
    """Band of each problem at the newest stratification."""
    evaluate: bool = False
    """The benchmarks after the newest stage have not been run yet."""
    within: Place | None = None
    """The fit that a checkpoint lies in; None after a stage."""
    stage_seconds: float = 0.0
    """How long that fit has taken."""
    stage_rows: int = 0
    """Rows that it began with."""
    tokens: Tokens = field(default_factory=Tokens)
    """What the run has cost."""
    bought: list[Bought] = field(default_factory=list)
    """What measuring outside GRPO took."""
    predictions: list[Prediction] = field(default_factory=list)
    """What `curriculum.probe.predictor` came to."""
    validated: dict[str, float] = field(default_factory=dict)
    """The held-out metrics of the student that the newest stage has handed on, where students are compared."""
    axis: Axis = field(default_factory=Axis)
    """Where the run stands on the axes of its loggers."""
    batch_parts: int = 1
    """See `Work.parts`."""
    sizes: dict[str, int] = field(default_factory=dict)
    """How long each growing file was: bytes of a .jsonl, rows of a .csv."""

    def report(self, place: Place, outcome: str, tokens: Tokens, seconds: float = 0.0, rows: int = 0) -> None:
        """Adds what became of a stage.

        Args:
            tokens: what the run has cost by now.
        """
        self.reports.append(StageReport(place, outcome, seconds, rows, scores=[], tokens=replace(tokens)))

    def ended(self, before: int) -> list[int]:
        """What the run had taken at the end of each round before this one."""
        last = {report.place.round: report.tokens.total for report in self.reports}
        return [tokens for number, tokens in last.items() if 0 < number < before]

    def bought_for(self, place: Place) -> list[Bought]:
        """What measuring for a stage took."""
        return [each for each in self.bought if (each.round, each.stage) == (place.round, place.stage)]

    def predictions_for(self, place: Place) -> list[Prediction]:
        """What the predictor came to where a stage was measured for."""
        return [each for each in self.predictions if (each.round, each.stage) == (place.round, place.stage)]

    def between_stages(self, student: Student, bands: dict[str, Band], seconds: float) -> RunState:
        """The state as it stands now, in no fit.

        Args:
            seconds: that the run has taken.
        """
        return replace(
            self,
            policy_version=student.policy_version,
            elapsed=seconds,
            bands=bands,
            within=None,
            stage_seconds=0.0,
            stage_rows=0,
            tokens=replace(student.tokens),
        )

    def as_tree(self) -> dict[str, Any]:
        return {**asdict(self), "critiques": [to_json(record) for record in self.critiques]}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> RunState:
        state = cls(**tree)
        state.reports = [
            StageReport(**{
                **report,
                "place": Place(**report["place"]),
                "scores": [Score(**score) for score in report["scores"]],
                "tokens": Tokens(**report["tokens"]),
            })
            for report in tree["reports"]
        ]  # fmt: skip
        state.tokens = Tokens(**tree["tokens"])
        state.bought = [Bought(**each) for each in tree.get("bought", [])]
        state.predictions = [Prediction(**each) for each in tree.get("predictions", [])]
        state.axis = Axis(**tree.get("axis", {}))
        state.critiques = [from_json(Critique, record) for record in tree["critiques"]]
        state.within = Place(**tree["within"]) if tree["within"] else None
        return state


@dataclass(frozen=True)
class Resumed:
    """A fit that goes on in its middle."""

    checkpoint: Path
    place: Place
    """With the epoch that it goes on in."""
    seconds: float
    """That it has taken so far."""
    rows: int
    """That it began with."""

    @classmethod
    def of(cls, checkpoint: Path, state: RunState) -> Resumed:
        """What a checkpoint within a fit says of it."""
        assert state.within is not None
        return cls(checkpoint, place=state.within, seconds=state.stage_seconds, rows=state.stage_rows)
