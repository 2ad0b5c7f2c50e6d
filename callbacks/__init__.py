"""Callbacks of slmreason. Import them as `slmreason.callbacks`; each does the one thing its name says."""

from slmreason.callbacks.budget import TokenBudget
from slmreason.callbacks.checkpoints import KeepCheckpoints, OutOfTime, SeedSteps
from slmreason.callbacks.curve import MeasureAtBudgets
from slmreason.callbacks.divergence import LogDivergence
from slmreason.callbacks.dump import DumpRollouts
from slmreason.callbacks.harvest import HarvestAllZeroGroups
from slmreason.callbacks.health import TrainingHealth
from slmreason.callbacks.predicted import LogPrediction
from slmreason.callbacks.progress import StageProgressBar, StageWatch
from slmreason.callbacks.rate import LogLearningRate
from slmreason.callbacks.reprobe import Reprobe
from slmreason.callbacks.samples import SampleCompletions
from slmreason.modules.record import RecordRollouts

__all__ = [
    "DumpRollouts",
    "HarvestAllZeroGroups",
    "KeepCheckpoints",
    "LogDivergence",
    "LogLearningRate",
    "LogPrediction",
    "MeasureAtBudgets",
    "OutOfTime",
    "RecordRollouts",
    "Reprobe",
    "SampleCompletions",
    "SeedSteps",
    "StageProgressBar",
    "StageWatch",
    "TokenBudget",
    "TrainingHealth",
]
