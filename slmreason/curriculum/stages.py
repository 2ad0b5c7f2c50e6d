"""One class a stage: what it measures and makes before its fit, which set it trains on, which callbacks that needs."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from slmreason.callbacks import HarvestAllZeroGroups, RecordRollouts, Reprobe
from slmreason.curriculum.affordable import Affordable
from slmreason.curriculum.parts import Parts
from slmreason.curriculum.prober import Prober
from slmreason.curriculum.sets import AcquisitionStage, ConsolidationStage, CritiqueStage, bridge_rejects, traces_said
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.curriculum.state import Resumed, RunState
from slmreason.curriculum.traces import TraceMaker
from slmreason.curriculum.trainer import epochs_of
from slmreason.data.datamodule import Restratified, StageSet
from slmreason.data.order import Informative
from slmreason.modules.base import StudentModule
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.sft import SFTModule
from slmreason.records import BridgeResult, Critique, Example, Place, Problem, from_json
from slmreason.run.files import append_records, read_lines, read_records, write_records
from slmreason.run.folder import RunFolder
from slmreason.run.journal import Journal
from slmreason.supervision.bridge import Bridge
from slmreason.supervision.critique import Critic
from slmreason.teacher.base import Teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tools:
    """What every stage of a run works with."""

    prober: Prober
    traces: TraceMaker
    files: RunFolder
    journal: Journal
    show_bands: Callable[[dict[str, int]], None]
    """Tells the loggers of the run how many problems are in each band."""


class Stage(ABC):
    """A stage of a round."""

    reason: str
    """Why it is skipped where its set is empty."""

    def __init__(self, module: StudentModule, tools: Tools) -> None:
        self.module, self.tools = module, tools
        self.prober, self.traces, self.files = tools.prober, tools.traces, tools.files
        self.student, self.data = module.student, tools.prober.data

    @abstractmethod
    def prepare(self, place: Place, run: RunState) -> StageSet | None:
        """Measures and makes what the fit needs, and gives its set; None where it must be skipped (`reason`)."""

    @abstractmethod
    def restore(self, place: Place, run: RunState) -> StageSet:
        """The set of a fit that goes on in its middle: what `prepare` made is in the files of the run."""

    @abstractmethod
    def callbacks(self, place: Place, run: RunState) -> list[Callback]:
        """What the fit needs besides what every fit has."""

    def asks_teacher(self, is_prepared: bool) -> bool:
        """Whether the teacher may be asked for the fit.

        Args:
            is_prepared: the fit goes on in its middle.
        """
        return False

    def enter(self, place: Place, run: RunState, resumed: Resumed | None) -> int:
        """Makes the set that the data module draws from: prepared, or read where the fit goes on in its middle.

        Returns:
            Rows of the first epoch; 0 where the stage must be skipped (`reason`).
        """
        if resumed is not None:
            epoch = resumed.place.epoch
            drawn = epoch, self.read_rows(self.files.stage(place).set(epoch))
            self.data.enter(self.restore(place, run), self._on_set, drawn)
            return resumed.rows
        stage_set = self.prepare(place, run)
        return 0 if stage_set is None else self.data.enter(stage_set, self._on_set)

    def _on_set(self, change: Restratified, drawn: Sequence[Any]) -> None:
        """Writes a set that was drawn."""
        folder = self.files.stage(change.place)
        append_records(folder.strata, [change])
        self.tools.show_bands(change.counts)
        self.wrote(change)
        write_records(folder.set(change.place.epoch), self.as_rows(drawn))

    def write_rejects(self, place: Place) -> None:
        """What teacher and verifier rejected since the last call."""
        if rejects := self.tools.journal.take_rejects():
            append_records(self.files.stage(place).rejects, rejects)

    def began(self, run: RunState) -> None:  # noqa: B027 - most stages have nothing to note
        """Notes that the fit begins, where it has not been begun before."""

    def wrote(self, change: Restratified) -> None:  # noqa: B027 - most sets are written whole by the curriculum
        """Writes what has been made for a set besides the set itself."""

    def was_begun(self) -> None:  # noqa: B027 - most stages are the same the second time
        """Notes that the run has begun such a stage before, in an earlier process."""

    def as_rows(self, drawn: Sequence[Any]) -> list[Any]:
        """A drawn set as it is written: with the text beside the tokens."""
        text = self.student.tokenizer.decode
        return [
            {"problem_id": row.problem_id, "origin": row.origin, "prompt": text(list(row.prompt_ids)),
             "target": text(list(row.target_ids)), "prompt_ids": row.prompt_ids, "target_ids": row.target_ids}
            for row in drawn
        ]  # fmt: skip

    def read_rows(self, path: Path) -> list[Any]:
        """What `as_rows` has written."""
        rows = [{k: v for k, v in row.items() if k not in ("prompt", "target")} for row in read_lines(path)]
        return [from_json(Example, row) for row in rows]

    def _measures_again(self, place: Place, problems: Sequence[Problem] | None = None) -> Reprobe:
        """At the end of each epoch, these problems, or a share of the pool."""
        return Reprobe(lambda epoch: self.prober.again(Place(place.round, place.stage, epoch), problems))


class SFTStage(Stage):
    """Teaches what is not mastered."""

    reason = "nobody is medium or hard with a trace that passes the checks"

    def __init__(
        self,
        module: SFTModule,
        tools: Tools,
        mixes_critiques: bool,
        makes_critiques: bool,
        max_tokens: int | None,
        epochs: int,
    ) -> None:
        """
        Args:
            mixes_critiques: the critiques of the round before are trained on too.
            makes_critiques: no CFT stage has made them.
            max_tokens: at which the run ends; None where it does not.
            epochs: of the fit.
        """
        super().__init__(module, tools)
        self.mixes_critiques, self.makes_critiques = mixes_critiques, makes_critiques
        self.max_tokens, self.epochs = max_tokens, epochs
        self._set: AcquisitionStage | None = None
        self._written = 0
        """Traces of the set that are in the stage's file."""

    def asks_teacher(self, is_prepared: bool) -> bool:
        """Each epoch draws its set anew, and may find problems in it that have no trace yet."""
        given = self.traces.given_traces
        return (self.mixes_critiques and self.makes_critiques) or any(p.id not in given for p in self.data.problems)

    def prepare(self, place: Place, run: RunState) -> StageSet:
        self.prober.before(place, run.last_grpo_began)
        if self.mixes_critiques and self.makes_critiques:
            run.critiques = self.traces.critiques(self.data.ledger.harvested(place.round - 1))
        return self._acquisition(place, run)

    def restore(self, place: Place, run: RunState) -> StageSet:
        stage = self._acquisition(place, run)
        made = read_records(self.files.stage(place).bridge, BridgeResult)
        stage.results = {(result.band or "", result.problem.id): result for result in made}
        self._written = len(stage.results)
        return stage

    def _acquisition(self, place: Place, run: RunState) -> AcquisitionStage:
        traces = self.traces
        traces.recall(self.files, place)
        self._written = 0
        self._set = AcquisitionStage(
            place=place,
            student=self.student,
            teach=lambda problems: traces.traces(place, problems, bridged=False, critiques=run.critiques),
            bridge=lambda problems: traces.traces(place, problems, bridged=True, critiques=run.critiques),
            route=self.data.routed,
            bridged_bands=traces.bridge.settings.bands,
            critiques=run.critiques if self.mixes_critiques else (),
            critique_kinds=traces.critic.settings.kinds,
            affordable=self._affordable(place),
        )
        return self._set

    def _affordable(self, place: Place) -> Affordable | None:
        if self.max_tokens is None:
            return None
        rng = self.data.rng
        return Affordable(
            max_tokens=self.max_tokens,
            spent=lambda: self.student.tokens.total,
            epochs=self.epochs,
            rng=lambda epoch: rng("affordable", place.round, place.stage, epoch),
        )

    def callbacks(self, place: Place, run: RunState) -> list[Callback]:
        return [self._measures_again(place)]

    def wrote(self, change: Restratified) -> None:
        assert self._set is not None
        new = list(self._set.results.values())[self._written :]
        is_first = self._written == 0
        self._written = len(self._set.results)
        folder = self.files.stage(change.place)
        append_records(folder.bridge, new)
        append_records(folder.rejects, bridge_rejects(new))
        if new and (is_first or any(result.chosen is None for result in new)):
            log.info("%s, %s", change.place.label, traces_said(new))


class GRPOStage(Stage):
    """Makes reliable what the student can do sometimes."""

    reason = "the Consolidation Set is empty: no problem short of mastery had a right rollout"

    def __init__(self, module: GRPOModule, tools: Tools, accumulate: int) -> None:
        """
        Args:
            accumulate: trainer.accumulate_grad_batches, which makes a step so many times larger.
        """
        super().__init__(module, tools)
        self.grpo = module
        self.prompts_per_step = module.settings.prompts_per_step * accumulate
        self.drawn = module.settings.draws_at_each_step
        order = module.settings.order
        self.weighs_age = order == "informative" or isinstance(order, Informative)

    def prepare(self, place: Place, run: RunState) -> StageSet:
        self.prober.before(place, run.last_grpo_began)
        return self._consolidation(place, self.student.policy_version)

    def restore(self, place: Place, run: RunState) -> StageSet:
        return self._consolidation(place, run.last_grpo_began or 0)

    def _consolidation(self, place: Place, began: int) -> ConsolidationStage:
        """
        Args:
            began: policy version that the fit begins with.
        """
        if self.grpo.settings.rescue.kind is not None:
            self.grpo.traces.chosen = self.traces.chosen(self.files, place)
        older = began if self.weighs_age else None
        data = self.data
        return ConsolidationStage(place, self.prompts_per_step, data.review_share, data, self.drawn, older)

    def as_rows(self, drawn: Sequence[Any]) -> list[Any]:
        return list(drawn)

    def read_rows(self, path: Path) -> list[Any]:
        return read_records(path, Problem)

    def callbacks(self, place: Place, run: RunState) -> list[Callback]:
        ledger = self.data.ledger
        return [RecordRollouts(ledger, place), HarvestAllZeroGroups(ledger, place)]

    def began(self, run: RunState) -> None:
        run.last_grpo_began = self.student.policy_version


class CFTStage(Stage):
    """Learns from groups whose rollouts all failed."""

    reason = "no all-zero group was harvested in this round"

    def __init__(self, module: CFTModule, tools: Tools, given: Sequence[Critique]) -> None:
        """
        Args:
            given: of `slmreason critique`; the first CFT trains on them too.
        """
        super().__init__(module, tools)
        self.given = list(given)

    def asks_teacher(self, is_prepared: bool) -> bool:
        return not is_prepared

    def prepare(self, place: Place, run: RunState) -> StageSet | None:
        given_ids = {record.problem.id for record in self.given}
        groups = [group for group in self.data.ledger.harvested(place.round) if group.problem.id not in given_ids]
        run.critiques = []
        if not groups and not self.given:
            self.reason = CFTStage.reason
            return None
        run.critiques = self.given + self.traces.critiques(groups)
        self.given = []  # for the first CFT alone: the next round has failures of its own
        self.reason = (
            f"no critique of {len(groups)} harvested groups passed the checks, or newer rollouts solved them all; the "
            "groups are kept in harvest.jsonl"
        )
        stage, folder = self._critique_set(place, run), self.files.stage(place)
        write_records(folder.critiques, run.critiques)
        append_records(folder.rejects, stage.rejects())
        return stage

    def restore(self, place: Place, run: RunState) -> StageSet:
        return self._critique_set(place, run)

    def was_begun(self) -> None:
        self.given = []  # an earlier CFT had them, or this one has them among its own

    def _critique_set(self, place: Place, run: RunState) -> CritiqueStage:
        return CritiqueStage(place, self.student, run.critiques, self.traces.critic.settings)

    def callbacks(self, place: Place, run: RunState) -> list[Callback]:
        """What CFT may have changed is its own set, and not a share of the pool."""
        ids = {record.problem.id for record in run.critiques}
        problems = [problem for problem in self.data.problems if problem.id in ids]
        return [self._measures_again(place, problems)]


def make_stages(
    parts: Parts,
    settings: CurriculumSettings,
    prober: Prober,
    teacher: Teacher,
    files: RunFolder,
    journal: Journal,
    flags: Mapping[str, Any],
    show_bands: Callable[[dict[str, int]], None],
) -> dict[str, Stage]:
    """The stages of a run by name.

    Args:
        teacher: `parts.teacher`, as it is asked by several processes.
        journal: that has what is rejected.
        flags: of the trainer.
        show_bands: tells the loggers of the run how many problems are in each band.
    """
    bridge = Bridge(parts.student, parts.engine, teacher, parts.reward, parts.bridge, parts.data.token_budget)
    critic = Critic(teacher, parts.student, parts.reward, parts.critique)
    traces = TraceMaker(prober.work, parts.data, parts.grpo.settings, bridge, critic, parts.given_traces)
    tools = Tools(prober, traces, files, journal, show_bands)
    makes_critiques = "cft" not in settings.stages
    given = [critic.recheck(record) for record in parts.given_critiques]
    return {
        "sft": SFTStage(
            parts.sft,
            tools,
            settings.mix_critiques,
            makes_critiques,
            settings.max_tokens,
            epochs_of(flags, parts.sft.settings.epochs),
        ),
        "grpo": GRPOStage(parts.grpo, tools, flags.get("accumulate_grad_batches") or 1),
        "cft": CFTStage(parts.cft, tools, given),
    }
