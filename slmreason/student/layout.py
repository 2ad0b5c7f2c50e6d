"""How a student's batches are scored, found by trying on its own model, and the check in which things are tried."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slmreason.records import Example
from slmreason.student import selfcheck
from slmreason.student.bundles import Bundle, alone
from slmreason.student.loading import embeddings, kind_of
from slmreason.student.packing import collate_bundles
from slmreason.student.scoring import Way, score_batch, ways
from slmreason.student.selfcheck import Check, Trial
from slmreason.student.weights import units

if TYPE_CHECKING:
    from slmreason.student.student import Student

log = logging.getLogger(__name__)
ROWS_OF_TWO = 20
"""As the hidden size it makes `collate` put the sequences of the check into two rows, with padding in one."""
PLAIN_ATTENTION = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers attend by a mask and by position ids, and by nothing else."""
Build = tuple[Any, ...]
"""What decides which computations are right, beside the model's type: attention, precision, device."""


@dataclass(frozen=True)
class Layout:
    """How batches are scored, as the model itself was found to allow."""

    way: Way
    shares_prompts: bool
    """Targets with one prompt may lie behind it in one row, told apart by a mask of ours."""


@dataclass
class Findings:
    """What was found by trying on one student."""

    layouts: dict[Build, Layout] = field(default_factory=dict)
    """See `layout_of`."""
    decodings: dict[Build, Any] = field(default_factory=dict)
    """See `slmreason.rollout.decoding`."""
    check: Check | None = None
    """The check that is going on."""
    build: Build | None = None
    """What it was begun with."""


def build_of(student: Student) -> Build:
    """The student's present build; within a check, not with the precision that weights are widened to."""
    attention = student.network.config._attn_implementation
    return student.findings.build or (attention, student.base_model.dtype, student.device.type)


def layout_of(student: Student) -> Layout:
    """How batches of the student are scored, found by trying when it is first asked for.

    Raises:
        ValueError: no way gives the log-probs of a plain forward pass; the message names the model's type.
    """
    layouts, build = student.findings.layouts, build_of(student)
    if build not in layouts:
        layouts[build] = _find(student)
    return layouts[build]


@contextmanager
def checking(student: Student) -> Iterator[Check]:
    """Within it ways of computing can be tried on the student (see `selfcheck`); it may be entered again.

    Raises:
        ValueError: the model has no plain forward pass to compare with.
    """
    findings, base = student.findings, student.base_model
    if findings.check is not None:
        yield findings.check
        return
    findings.build = build_of(student)
    # Widening half a billion weights takes seconds; types whose float32 numbers the tests know do without.
    is_known = base.config.model_type in PLAIN_ATTENTION
    is_flash = student.network.config._attn_implementation.startswith("flash")
    widen = not is_known and not is_flash and not units(base)
    try:
        with student.evaluating(), student.whole(), selfcheck.exactly(base, widen) as dtype:
            examples = selfcheck.examples(student.tokenizer, embeddings(base))
            findings.check = Check(examples, _plain_log_probs(student, examples), dtype)
            yield findings.check
    finally:
        findings.check = findings.build = None


def attends_plainly(config: Any) -> bool:
    """Whether layers attend to all tokens before, told apart by a mask or by position ids alone."""
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    return config.model_type in PLAIN_ATTENTION and full


def _plain_log_probs(student: Student, examples: Sequence[Example]) -> list[Tensor]:
    try:
        return [selfcheck.plain_log_probs(student.network, example) for example in examples]
    except Exception as error:
        raise ValueError(
            f"student.model: {kind_of(student.base_model)} is no causal language model of text that can be trained "
            f"here: its forward pass ends in {selfcheck.fault_of(error)}"
        ) from error


def _find(student: Student) -> Layout:
    """Compares the ways to score with a plain forward pass; neither weights, mode nor random numbers change."""
    kind = kind_of(student.base_model)
    with checking(student) as check:
        score = partial(_log_probs, student, alone(check.examples))
        way, off = selfcheck.first_right(ways(student.network), score, check.log_probs, check.dtype)
        if way is None:
            raise ValueError(
                f"student.model: {kind} cannot be trained here. Its log-probs are compared with those of a "
                f"forward pass over each sequence alone: {'; '.join(map(str, _nearest(off)))}"
            )
        shares = way.packed and _may_share_prompts(student) and _shares_prompts_rightly(student, way, check)
    if not way.packed:
        worst = min(off, key=lambda trial: trial.gap)
        log.warning("student.model: %s: each sequence gets a row of its own, at the price of padding: log-probs "
                    "are off otherwise (%s)", kind, worst)  # fmt: skip
    return Layout(way, shares)


def _log_probs(student: Student, bundles: Sequence[Bundle[Example]], way: Way) -> list[Tensor]:
    """Of the targets of each sequence, scored in a way. [target] each."""
    batch = collate_bundles(bundles, student.pad_token_id, hidden_size=ROWS_OF_TWO).to(student.device)
    pieces = score_batch(student.network, batch, way).log_probs.split(batch.target_lengths.tolist())
    in_order = sorted(zip(batch.order, pieces, strict=True), key=lambda pair: pair[0])
    return [piece for _, piece in in_order]


def _nearest(off: Sequence[Trial[Way]]) -> list[Trial[Way]]:
    """Of the ways that were off, the best with several sequences a row, and the best with one."""
    return [min((t for t in off if t.way.packed == packed), key=lambda t: t.gap) for packed in (True, False)]


def _may_share_prompts(student: Student) -> bool:
    config = student.base_model.config
    return attends_plainly(config) and config._attn_implementation == "sdpa"


def _shares_prompts_rightly(student: Student, way: Way, check: Check) -> bool:
    """Whether log-probs are right where two targets lie behind one prompt."""
    first, second, other = check.examples
    score = partial(_log_probs, student, [Bundle((first, second)), Bundle((other,))])
    right, _ = selfcheck.first_right([way], score, check.log_probs, check.dtype)
    return right is not None
