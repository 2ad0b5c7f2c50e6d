"""How much a run still samples, about: for those who watch it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slmreason.curriculum.prober import Prober
from slmreason.curriculum.scorer import Scorer
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.curriculum.stages import Stage
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.records import Place


def completions_ahead(
    places: Sequence[Place],
    stages: Mapping[str, Stage],
    settings: CurriculumSettings,
    data: ReasoningDataModule,
    prober: Prober,
    scorer: Scorer,
) -> int:
    """Completions that these places sample, about: a set may shrink, and a stage may be skipped."""
    total = 0
    for place in places:
        if _is_scored(place, settings):
            total += scorer.completions
        if place.stage == "base":
            continue
        epochs = stages[place.stage].module.settings.epochs
        nothing_measured = place.round == 1 and not len(data.ledger)
        total += prober.completions(place, epochs, nothing_measured)
        if place.stage == "grpo":
            total += len(data.problems) * prober.grpo.group_size * epochs
    return total


def _is_scored(place: Place, settings: CurriculumSettings) -> bool:
    ends_round = place.stage == settings.stages[-1] if settings.stages else False
    return place.stage == "base" or settings.evaluate == "stage" or (settings.evaluate == "round" and ends_round)
