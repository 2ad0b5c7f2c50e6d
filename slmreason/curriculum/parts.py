"""What a run works with, as its config makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from slmreason.curriculum.trainer import FreshConfig
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.evaluate.benchmarks import Benchmark, EvaluationSettings
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.sft import SFTModule
from slmreason.records import Critique, Trace
from slmreason.rollout.engine import RolloutEngine
from slmreason.student import Student
from slmreason.supervision.critique import CritiqueSettings
from slmreason.supervision.settings import BridgeSettings
from slmreason.teacher.base import Teacher
from slmreason.verify.rewards import RewardFn


@dataclass
class Parts:
    """The objects that a config names, each built."""

    student: Student
    data: ReasoningDataModule
    sft: SFTModule
    grpo: GRPOModule
    cft: CFTModule
    engine: RolloutEngine
    reward: RewardFn
    teacher: Teacher | None
    bridge: BridgeSettings
    critique: CritiqueSettings
    benchmarks: Sequence[Benchmark]
    evaluation: EvaluationSettings
    trainer_config: FreshConfig
    device: torch.device
    given_traces: Mapping[str, Trace] = field(default_factory=dict)
    """Of `slmreason bridge`, by the pool's ids; their problems' traces are taken from here."""
    scored_traces: Mapping[str, str] = field(default_factory=dict)
    """What rho is predicted from, by the pool's ids; empty without `curriculum.probe.predictor`."""
    given_critiques: Sequence[Critique] = ()
    """Of `slmreason critique`; the next CFT trains on them too."""
