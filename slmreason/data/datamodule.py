"""The data strategy inside Lightning: the training set is drawn anew from the ledger at each epoch boundary.

The module holds the pool and the ledger. Which set a fit trains on is a `StageSet`, entered before the fit; at every
epoch boundary Lightning asks for a new dataloader, and what it gets is stratified from what is known by then.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from torch.utils.data import DataLoader

from slmreason.data.contamination import contaminated
from slmreason.data.evidence import as_ledger_rows, matched_evidence
from slmreason.data.identity import refuse_no_match
from slmreason.data.ledger import Ledger
from slmreason.data.sources import Columns, load_problems, most_common
from slmreason.data.strata import Bands, Routing, Strata, routed, stratify
from slmreason.records import Band, Example, Place, Problem, Reject
from slmreason.rollout.engine import PromptLimit
from slmreason.runtime.distributed import rank, world_size
from slmreason.student import Student
from slmreason.student.packing import HIDDEN_SIZE, PackedBatch, collate, plan_batches, without_targets

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

    def describe(self) -> str:
        bands = " ".join(f"{name} {count}" for name, count in self.counts.items() if count)
        moves = ", ".join(f"{move} {count}" for move, count in sorted(self.moves.items())) or "nobody moved"
        where = f"round {self.place.round} {self.place.stage} epoch {self.place.epoch}"
        return f"{where}: {bands} | {moves} | {self.rows} rows to train on"


class ReasoningDataModule(L.LightningDataModule):
    """Problems with checkable answers, re-stratified by difficulty at each epoch boundary."""

    def __init__(
        self,
        train: str,
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
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            train: The pool: `embedded:FAMILY/SPLIT?count=N&difficulty=1,2`, a file (.jsonl, .json, .parquet, .csv,
                .tsv, and with .gz), `NAME=FILE`, or a hub name such as `openai/gsm8k`.
            columns: Which column is what, when the dataset is not a known one.
            split: Split of a hub dataset.
            limit: Read no more than so many rows of the pool.
            max_prompt_tokens: Problems with a longer prompt are set aside into rejects.jsonl.
            token_budget: Tokens in a micro-batch, of SFT, CFT and GRPO alike: the bound on memory.
            batch_size: At most so many examples in a micro-batch of SFT and CFT; the token budget alone when not set.
            bands: Where the difficulty bands begin.
            review_share: Share of the Consolidation Set that mastered problems make up.
            routing: Who is in the sets of SFT and GRPO: `difficulty` is the method; the others are its controls,
                `random` by lot with the same sizes, `all` everybody in both.
            decontaminate: Problems that a benchmark asks too, to the letter or but for case, spacing and punctuation,
                are set aside into rejects.jsonl; false keeps them, with a warning.
            evidence: File of `slmreason stratify` for this student: what it measured is not measured again. Its lines
                are matched by question and gold, and how many match is said.
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
        self.train = train
        self.columns, self.split, self.limit = columns, split, limit
        self.max_prompt_tokens, self.decontaminate, self.evidence = max_prompt_tokens, decontaminate, evidence
        self.token_budget, self.batch_size = token_budget, batch_size
        self.bands, self.review_share, self.routing = bands, review_share, routing
        self.num_workers, self.seed = num_workers, seed
        self.problems: tuple[Problem, ...] = ()
        self.rejects: tuple[Reject, ...] = ()
        self.evidence_rows: list[dict[str, Any]] = []
        self.unmatched: tuple[Reject, ...] = ()
        """Lines of evidence, traces and critiques that are about no problem of the pool."""
        self.ledger = Ledger(None)
        self.band_of: dict[str, Band] = {}
        """Band of each problem at the newest stratification."""
        self._stage: StageSet | None = None
        self._on_set: Callable[[Restratified, Sequence[Any]], None] | None = None
        self._rows: Sequence[Any] = ()
        self._built_at: tuple[int, int] | None = None

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
            ValueError: the source is unreadable, or every problem of it was set aside.
        """
        loaded = load_problems(self.train, self.columns, self.split, self.limit)
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
        if not loaded.problems:
            last = loaded.rejects[-1]
            raise ValueError(f"data.train: {self.train}: every problem was set aside: {most_common(loaded.rejects)}; "
                             f"the last in {last.where}: {last.reason}")  # fmt: skip
        self.problems, self.rejects = loaded.problems, loaded.rejects
        if self.evidence is not None:
            matched = matched_evidence(Path(self.evidence), self.problems)
            refuse_no_match(matched, "data.evidence", self.evidence)
            log.info(matched.describe(f"data.evidence {self.evidence}", len(self.problems)))
            self.evidence_rows, self.unmatched = as_ledger_rows(matched), matched.rejects

    # -- one fit ----------------------------------------------------------------------------------------------------

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
        self._stage, self._on_set, self._built_at = stage, on_set, None
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
                        self._stage.place.stage, epoch)  # fmt: skip
        accumulate = self.trainer.accumulate_grad_batches
        batches = self._stage.batches(self._rows, self, epoch, accumulate)
        loop = self.trainer.fit_loop
        return PlannedLoader(
            batches,
            start=loop.epoch_loop.batch_progress.current.completed if loop.restarting else 0,
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def _restratify(self, epoch: int) -> None:
        assert self._stage is not None
        if self._built_at == (epoch, self.ledger.version):
            return
        strata = stratify(self.ledger, self.problems, self.bands)
        self._rows = self._stage.build(strata, epoch)
        place = Place(self._stage.place.round, self._stage.place.stage, epoch)
        change = Restratified(place, strata.counts, dict(strata.moves_from(self.band_of)), len(self._rows))
        self.band_of, self._built_at = strata.band_of, (epoch, self.ledger.version)
        log.info(change.describe())
        if self._on_set is not None:
            self._on_set(change, self._rows)

    def routed(self, strata: Strata) -> Strata:
        """The strata that SFT and GRPO draw from; the lot of `random` is cast once a run."""
        return routed(strata, self.routing, self.rng("routing"))

    def rng(self, *key: object) -> random.Random:
        """A generator of its own for each purpose, so one draw never shifts another."""
        return random.Random("/".join(map(str, (self.seed, *key))))


class PlannedLoader(DataLoader[Any]):
    """Batches that were planned beforehand, from the `start`-th on: a fit that goes on has had those before it."""

    def __init__(self, batches: Sequence[Any], start: int, num_workers: int, pin_memory: bool) -> None:
        super().__init__(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(start, len(batches)),
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # an iterator draws a seed for its workers: not from the global generator
        )

    def __len__(self) -> int:
        """Batches of the whole epoch: what Lightning counts against."""
        return len(self.dataset)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning's loop knows the place. Having this method tells it that we can go on from there."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: see `state_dict`."""


class PackedDataset(Sequence[PackedBatch]):
    """Micro-batches of supervised examples, planned at once for all processes and collated when asked for.

    An optimizer step is a window of `accumulate` micro-batches in each process. The plan knows how many target tokens a
    window has in all, and every micro-batch carries that number: two processes, or two accumulated micro-batches, then
    give the same gradient as one large batch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: list[list[int]],
        accumulate: int,
        pad_token_id: int,
        rank: int = 0,
        world_size: int = 1,
        hidden_size: int = HIDDEN_SIZE,
        device_type: str = "cpu",
    ) -> None:
        self.hidden_size, self.device_type = hidden_size, device_type
        self.examples, self.plan, self.accumulate, self.pad_token_id = examples, plan, accumulate, pad_token_id
        self.rank, self.world_size = rank, world_size
        tokens = [sum(len(examples[i].target_ids) for i in batch) for batch in plan]
        window = accumulate * world_size
        self.step_tokens = [sum(tokens[start : start + window]) for start in range(0, len(plan), window)]

    def __len__(self) -> int:
        return -(-len(self.plan) // self.world_size)

    def __getitem__(self, index: int) -> PackedBatch:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = self.step_tokens[index // self.accumulate]
        planned = index * self.world_size + self.rank
        if planned >= len(self.plan):
            return without_targets(self.pad_token_id, tokens, self.accumulate)
        chosen = [self.examples[i] for i in self.plan[planned]]
        return collate(
            chosen,
            self.pad_token_id,
            tokens,
            self.accumulate,
            hidden_size=self.hidden_size,
            device_type=self.device_type,
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        return (self[index] for index in range(len(self)))


def packed_batches(
    examples: Sequence[Example], data: ReasoningDataModule, epoch: int, accumulate: int, student: Student, place: Place
) -> PackedDataset:
    """Shuffles and cuts the examples of one epoch into micro-batches of the token budget."""
    rng = data.rng("shuffle", place.round, place.stage, epoch)
    plan = plan_batches([len(example) for example in examples], data.token_budget, data.batch_size, rng)
    return PackedDataset(
        examples, plan, accumulate, student.pad_token_id, rank(), world_size(), student.hidden_size, student.device.type
    )
