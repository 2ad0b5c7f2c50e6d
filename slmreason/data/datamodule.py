"""The data strategy inside Lightning: the training set is drawn anew from the ledger at each epoch boundary.

The module holds the pool and the ledger. Which set a fit trains on is a `StageSet`, entered before the fit; at every
epoch boundary Lightning asks for a new dataloader, and what it gets is stratified from what is known by then.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import lightning as L
from torch.utils.data import DataLoader

from slmreason.data.batches import PlannedLoader, PromptBatches
from slmreason.data.columns import Columns
from slmreason.data.contamination import contaminated
from slmreason.data.evidence import matched_evidence, of_pool
from slmreason.data.identity import refuse_no_match
from slmreason.data.ledger import Ledger
from slmreason.data.mixture import Entry, entries_of, held_out, read_pool
from slmreason.data.reading import Loaded
from slmreason.data.sources import most_common
from slmreason.data.strata import Bands, Routing, Strata, routed, stratify
from slmreason.data.validation import read_validation, without_validation
from slmreason.records import Band, Evidence, Place, Problem, Reject
from slmreason.rollout.engine import PromptLimit

log = logging.getLogger(__name__)


class StageSet(Protocol):
    """Who is in the set of one fit, given the strata, and how its rows become batches."""

    @property
    def place(self) -> Place: ...

    def build(self, strata: Strata, epoch: int) -> Sequence[Any]:
        """The rows of this epoch."""
        ...

    def batches(self, rows: Sequence[Any], data: ReasoningDataModule, epoch: int, accumulate: int) -> Sequence[Any]:
        """The rows as what the dataloader yields."""
        ...


@dataclass(frozen=True)
class Restratified:
    """What an epoch boundary changed."""

    place: Place
    counts: dict[str, int]
    moves: dict[str, int]
    rows: int
    certainty: dict[str, float] = field(default_factory=dict)
    """Of each band: the share of its problems that is expected to belong there; empty where that is not known."""
    predictor: dict[str, float] = field(default_factory=dict)
    """Of `curriculum.probe.predictor`: its held-out rank correlation, whether it is used, the weight of its priors in
    rollouts, and how many problems are in a band by it alone; empty where nothing is predicted."""

    def describe(self) -> str:
        bands = " ".join(f"{name} {count}" for name, count in self.counts.items() if count)
        moves = ", ".join(f"{move} {count}" for move, count in sorted(self.moves.items())) or "nobody moved"
        location = f"round {self.place.round} {self.place.stage} epoch {self.place.epoch + 1}"
        sure = "".join(f", {name} {share:.0%}" for name, share in self.certainty.items())
        certain = f" | in their true band {sure[2:]}" if sure else ""
        if alone := self.predictor.get("bands"):
            certain += f" | {alone:.0f} of them by prediction alone"
        return f"{location}: {bands}{certain} | {moves} | {self.rows} rows to train on"


class ReasoningDataModule(L.LightningDataModule):
    """Problems with checkable answers, re-stratified by difficulty at each epoch boundary."""

    def __init__(
        self,
        train: str | list[str | Entry],
        columns: Columns | None = None,
        split: str | None = None,
        limit: int | None = None,
        max_prompt_tokens: int = 512,
        token_budget: int = 8192,
        batch_size: int | None = None,
        bands: Bands = Bands(),  # noqa: B008 - frozen
        review_share: float = 0.1,
        routing: Routing = "difficulty",
        decontaminate: bool = True,
        evidence: str | None = None,
        holdout: float = 0.0,
        validation: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            train: The pool: `embedded:FAMILY/SPLIT?count=N&difficulty=1,2`, a file (.jsonl, .json, .parquet, .csv,
                .tsv, and with .gz), `NAME=FILE`, or a hub name such as `openai/gsm8k`. A list of these is one pool; an
                entry of it may be `{path, columns, weight, reward, limit, split}`.
            columns: Which column is what, when the dataset is not a known one.
            split: Split of a hub dataset.
            limit: Read no more than so many rows of the pool; of each data set, where there are several.
            max_prompt_tokens: Problems with a longer prompt are rejected into rejects.jsonl.
            token_budget: Tokens in a micro-batch, of SFT, CFT and GRPO alike: the bound on memory.
            batch_size: At most so many examples in a micro-batch of SFT and CFT; the token budget alone when not set.
            bands: Where the difficulty bands begin.
            review_share: Share of the Consolidation Set that mastered problems make up.
            routing: Who is in the sets of SFT and GRPO: `difficulty` is the method; the others are its controls,
                `random` by lot with the same sizes, `all` everybody in both.
            decontaminate: Problems that a benchmark asks too, to the letter or but for case, spacing and punctuation,
                are rejected into rejects.jsonl; false keeps them, with a warning.
            evidence: File of `slmreason stratify` for this student: what it measured is not measured again. Its lines
                are matched by question and gold, and how many match is said.
            holdout: Share of the pool that is never trained on, chosen by question and gold; 0 keeps none. Fits are
                validated on it.
            validation: In place of a share of the pool a data set, named as in `data.train`, that fits are validated
                on. What of the pool stands in it is rejected. `data.columns`, `data.split` and `data.limit` hold.
            num_workers: Worker processes of the dataloader; batches are planned beforehand, so the order is the same.
            seed: Of shuffling and review draws.

        Raises:
            ValueError: a number is out of its range; the message names the key.
        """
        super().__init__()
        for key, value in (("max_prompt_tokens", max_prompt_tokens), ("token_budget", token_budget)):
            if value < 1:
                raise ValueError(f"data.{key} must be at least 1, got {value}")
        if not 0 <= review_share <= 1:
            raise ValueError(f"data.review_share must be within 0 and 1, got {review_share}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, got {batch_size}")
        if not 0 <= holdout < 1:
            raise ValueError(f"data.holdout must be at least 0 and below 1, got {holdout}")
        if holdout and validation is not None:
            raise ValueError("data.validation: fits are validated on this or on data.holdout, not on both")
        self.entries = entries_of(train, "data.train", columns, split, limit)
        self.validated_on = entries_of(validation, "data.validation", columns, split, limit) if validation else ()
        self.holdout_share = holdout
        self.holdout: tuple[Problem, ...] = ()
        """Problems that are never trained on: a share of the pool, or those of `data.validation`."""
        self.max_prompt_tokens, self.decontaminate, self.evidence = max_prompt_tokens, decontaminate, evidence
        self.token_budget, self.batch_size = token_budget, batch_size
        self.bands, self.review_share, self.routing = bands, review_share, routing
        self.num_workers, self.seed = num_workers, seed
        self.problems: tuple[Problem, ...] = ()
        self.wants_column: Callable[[str], bool] | None = None
        """Which columns of their rows the problems keep for a reward function."""
        self.rejects: tuple[Reject, ...] = ()
        self.given_evidence: list[Evidence] = []
        self.unmatched: tuple[Reject, ...] = ()
        """Lines of evidence, traces and critiques that are about no problem of the pool."""
        self.ledger = Ledger(None, bands.fading)
        self.band_of: dict[str, Band] = {}
        """Band of each problem at the newest stratification."""
        self._stage: StageSet | None = None
        self._on_set: Callable[[Restratified, Sequence[Any]], None] | None = None
        self._rows: Sequence[Any] = ()
        self._built_at: tuple[int, int] | None = None
        self._is_by_hand = False
        """The set was not entered by a curriculum, but when a Trainer asked for it."""

    # -- the pool ---------------------------------------------------------------------------------------------------

    def load(
        self,
        prompt_length: Callable[[Problem], int],
        benchmarks: Mapping[str, Iterable[Problem]],
        longest: PromptLimit | None = None,
    ) -> None:
        """Reads the pool, and the evidence that `slmreason stratify` wrote of it.

        Args:
            prompt_length: problem -> number of prompt tokens under the student's template.
            benchmarks: problems that are not to be trained on, by the benchmark's name.
            longest: prompt that leaves room for its rollouts in the student and the engine.

        Raises:
            ValueError: a source is unreadable, or every problem of it was rejected.
        """
        tokens = min(self.max_prompt_tokens, longest.tokens if longest else self.max_prompt_tokens)
        validation = read_validation(self.validated_on, lambda each: prompt_length(each) <= tokens)
        keep = lambda loaded: without_validation(  # noqa: E731
            self._kept(loaded, prompt_length, benchmarks, longest), validation
        )
        pool = read_pool(self.entries, keep, self.seed, self.wants_column)
        self.problems, share = held_out(pool.problems, self.holdout_share)
        self.holdout, self.rejects = validation or share, pool.rejects
        if share:
            log.info("data.holdout: %d of %d problems are kept from training", len(self.holdout), len(pool.problems))
        if self.evidence is not None:
            matched = matched_evidence(Path(self.evidence), self.problems)
            refuse_no_match(matched, "data.evidence", self.evidence)
            log.info(matched.describe(f"data.evidence {self.evidence}", len(self.problems)))
            self.given_evidence, self.unmatched = of_pool(matched), matched.rejects

    @property
    def pool_name(self) -> str:
        """Where the pool comes from, for a line on the screen."""
        return ", ".join(entry.path for entry in self.entries)

    def describe_pool(self) -> str:
        """How many problems there are and from where, how many rows were rejected, and why most of them."""
        said = f"pool: {len(self.problems)} problems from {self.pool_name}, {len(self.rejects)} rejected"
        return f"{said}: {most_common(self.rejects)}" if self.rejects else said

    def _kept(
        self,
        loaded: Loaded,
        prompt_length: Callable[[Problem], int],
        benchmarks: Mapping[str, Iterable[Problem]],
        longest: PromptLimit | None,
    ) -> Loaded:
        """What was read, without the problems whose prompt is too long and those that a benchmark asks too."""
        read, limit = len(loaded.problems), self.max_prompt_tokens
        if longest is None or limit <= longest.tokens:
            loaded = loaded.within(prompt_length, limit, f"data.max_prompt_tokens is {limit}")
        else:
            loaded = loaded.within(prompt_length, longest.tokens, longest.why)
            if too_long := read - len(loaded.problems):
                log.warning("data.train: %d of %d prompts are too long: %s", too_long, read, longest.why)
        found = contaminated(loaded.problems, benchmarks)
        if self.decontaminate:
            loaded = loaded.without(found)
        elif found:
            log.warning("%d of %d training problems stand in a benchmark too and are kept (data.decontaminate): %s",
                        len(found), len(loaded.problems), next(iter(found.values())))  # fmt: skip
        return loaded

    # -- one fit ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Where no set was entered, that of the LightningModule is: `trainer.fit(module, datamodule=data)` is enough.

        Raises:
            ValueError: the pool cannot be read, or there is nothing in it for the module to train on.
        """
        trainer = self.trainer
        if stage not in ("fit", "validate") or trainer is None or (self._stage is not None and not self._is_by_hand):
            return
        if getattr(trainer, "reload_dataloaders_every_n_epochs", None) == 0:  # as it is where nobody said anything
            trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        rows = trainer.lightning_module.enter(self)  # type: ignore[operator]
        self._is_by_hand = True
        if not rows and stage == "fit":
            raise ValueError(f"data.train: {self.pool_name}: there is nothing to train on: every problem is mastered, "
                             "or has no trace that passes the checks")  # fmt: skip

    def enter(
        self,
        stage: StageSet,
        on_set: Callable[[Restratified, Sequence[Any]], None] | None = None,
        drawn: tuple[int, Sequence[Any]] | None = None,
    ) -> int:
        """Stratifies for the first epoch of a fit on `stage`.

        Args:
            on_set: called with what changed and the rows whenever a set was drawn.
            drawn: the epoch and the rows of a fit that goes on in its middle; they were drawn before.

        Returns:
            How many rows the fit would start with; 0 means that it must be skipped.
        """
        self._stage, self._on_set, self._built_at, self._is_by_hand = stage, on_set, None, False
        if drawn is not None:
            self._rows, self._built_at = drawn[1], (drawn[0], self.ledger.version)
        else:
            self._restratify(0)
        return len(self._rows)

    def train_dataloader(self) -> DataLoader[Any]:
        """The set of the present epoch, from the ledger as it stands; Lightning asks again at each epoch boundary.

        Raises:
            RuntimeError: the trainer was not told to ask again.
        """
        assert self.trainer is not None
        assert self._stage is not None
        if getattr(self.trainer, "reload_dataloaders_every_n_epochs", 0) != 1:
            raise RuntimeError("trainer.reload_dataloaders_every_n_epochs must be 1: each epoch has its own set")
        epoch = self.trainer.current_epoch
        self._restratify(epoch)
        if not self._rows:
            log.warning("round %d %s: the set is empty from epoch %d on, the fit ends here", self._stage.place.round,
                        self._stage.place.stage, epoch + 1)  # fmt: skip
        accumulate = self.trainer.accumulate_grad_batches
        batches = self._stage.batches(self._rows, self, epoch, accumulate)
        loop = self.trainer.fit_loop
        return PlannedLoader(
            batches,
            start=loop.epoch_loop.batch_progress.current.completed if loop.restarting else 0,
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> Any:
        """The held-out problems; no loader where there are none, or the module has nothing to sample and grade with."""
        assert self.trainer is not None
        validation = getattr(self.trainer.lightning_module, "validation", None)
        if validation is None or not self.holdout:
            return []
        return PromptBatches(self.holdout, validation.problems_per_batch)

    def _restratify(self, epoch: int) -> None:
        assert self._stage is not None
        if self._built_at == (epoch, self.ledger.version):
            return
        strata = stratify(self.ledger, self.problems, self.bands)
        self._rows = self._stage.build(strata, epoch)
        place = Place(self._stage.place.round, self._stage.place.stage, epoch)
        moves = dict(strata.moves_from(self.band_of))
        change = Restratified(
            place, strata.counts, moves, len(self._rows), strata.mean_certainty, self._predictor_of(strata)
        )
        self.band_of, self._built_at = strata.band_of, (epoch, self.ledger.version)
        log.info(change.describe())
        if self._on_set is not None:
            self._on_set(change, self._rows)

    def _predictor_of(self, strata: Strata) -> dict[str, float]:
        predicted = self.ledger.predicted
        return {} if predicted is None else {**predicted.metrics(), "bands": len(strata.predicted)}

    def routed(self, strata: Strata) -> Strata:
        """The strata that SFT and GRPO draw from; the lot of `random` is cast once a run."""
        return routed(strata, self.routing, self.rng("routing"))

    def rng(self, *key: object) -> random.Random:
        """A generator of its own for each purpose, so one draw never shifts another."""
        return random.Random("/".join(map(str, (self.seed, *key))))
