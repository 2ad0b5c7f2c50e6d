"""The nouns: frozen dataclasses that flow between the rooms, each with one JSON form.

Nothing here touches a model or a file. `to_json` gives plain dicts, lists and scalars; `from_json` refuses
unknown and missing fields and wrong types by name, so a file written by hand fails where it is wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

Band = Literal["simple", "medium", "hard"]
BAND_NAMES: tuple[Band, ...] = ("simple", "medium", "hard")
Provenance = Literal["teacher", "bridged", "handover", "rationalised", "self"]
"""Who wrote a trace; `teacher` too where it came with the problem. Of `rationalised` it was the student, which saw the
teacher's."""
CritiqueKind = Literal["diagnosis", "repair", "new_trace"]
CRITIQUE_KINDS: tuple[CritiqueKind, ...] = get_args(CritiqueKind)
Role = Literal["system", "user", "assistant"]

T = TypeVar("T")


def to_json(record: Any) -> dict[str, Any]:
    """The JSON form of a record: its fields by name, nested records as nested dicts, a `Fault` as its text."""
    fields = {field.name: _as_json(getattr(record, field.name)) for field in dataclasses.fields(record)}
    for name in _LEFT_OUT_WHERE_EMPTY & fields.keys():
        if not fields[name]:
            del fields[name]
    return fields


_LEFT_OUT_WHERE_EMPTY = {"turns", "columns", "scores", "extra", "certainty", "predictor"}
"""Fields that most records do not need: their files stay as short as they can be."""


def _as_json(value: Any) -> Any:
    if isinstance(value, Fault):
        return str(value)
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, tuple | list) and not set(map(type, value)) <= _SCALARS:
        return type(value)(_as_json(item) for item in value)
    return value


def from_json(cls: type[T], data: Any) -> T:
    """Builds a record of `cls` from its JSON form.

    Raises:
        ValueError: a field is unknown, missing or of another type; the message names the record and the field.
    """
    name = cls.__name__
    if not isinstance(data, Mapping):
        raise ValueError(f"{name} must be an object, not {reprlib.repr(data)}")
    kinds, required = _fields(cast(type, cls))
    unknown, missing = sorted(set(data) - set(kinds)), sorted(required - set(data))
    if unknown or missing:
        raise ValueError(f"{name}: unknown fields {unknown}, missing fields {missing}")
    return cls(**{key: _typed(kinds[key], value, f"{name}: {key}") for key, value in data.items()})


@lru_cache
def _fields(cls: type) -> tuple[dict[str, Any], set[str]]:
    """(type of each field, those without a default)."""
    fields, kinds, nothing = dataclasses.fields(cls), get_type_hints(cls), dataclasses.MISSING
    return {f.name: kinds[f.name] for f in fields}, {
        f.name for f in fields if f.default is nothing and f.default_factory is nothing
    }


_PLAIN: dict[Any, tuple[str, Any]] = {
    str: ("a text", str), int: ("a whole number", int), float: ("a number", int | float), bool: ("true or false", bool)
}  # fmt: skip


_SCALARS = {str, int, float, bool, type(None)}


def _typed(kind: Any, value: Any, what: str) -> Any:
    """A JSON value as a field of type `kind`; `what` names the field, for the error."""
    origin, options = get_origin(kind), get_args(kind)
    if type(None) in options:
        return None if value is None else _typed(options[0], value, what)
    if kind is Fault:
        return Fault.read(_typed(str, value, what))
    if dataclasses.is_dataclass(kind):
        return from_json(cast(type, kind), value)
    if origin is tuple and isinstance(value, list | tuple):
        # Numbers are looked at together: a rollout has hundreds of tokens.
        if options[0] is str or not set(map(type, value)) <= {options[0]}:
            return tuple(_typed(options[0], item, what) for item in value)
        return tuple(value)
    if kind in _PLAIN and isinstance(value, _PLAIN[kind][1]) and isinstance(value, bool) == (kind is bool):
        if kind is str:
            check_text(value, what)
        return value
    if (origin is Literal and value in options) or kind is Any or origin is dict:
        return value
    wanted = _PLAIN[kind][0] if kind in _PLAIN else f"one of {', '.join(options)}" if origin is Literal else "a list"
    raise ValueError(f"{what} must be {wanted}, not {reprlib.repr(value)}")


def check_text(text: str, what: str) -> None:
    """Refuses half a character, as `"\\ud800"` is in JSON: no tokenizer takes it and no file can hold it.

    Raises:
        ValueError: there is one; the message names `what` the text is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a character (a lone surrogate) at position {error.start + 1}") from error


@dataclass(frozen=True)
class Place:
    """Where in a run something happened."""

    round: int
    stage: str
    epoch: int = 0

    @property
    def label(self) -> str:
        """What a person reads: `base`, `round 1 sft`."""
        return f"round {self.round} {self.stage}" if self.round else self.stage

    @property
    def folder(self) -> str:
        """Of the stage's files within a run: `round-01/sft`."""
        return f"round-{self.round:02d}/{self.stage}"


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said before the question of a problem."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)  # there may be a million
class Problem:
    """A question with a checkable answer."""

    id: str
    question: str
    answer: str
    r"""The gold answer as the verifier compares it: a number, an expression, a choice letter, a list in order (`2, 3`)
    or a set of answers in any order (`\{2, 3\}`)."""
    trace: str | None = None
    """A worked solution that came with the dataset, if any."""
    source: str = ""
    choices: tuple[str, ...] | None = None
    """Option texts of a multiple-choice problem, in the order A, B, C, ...; they stand in the question too."""
    tolerance: float = 0.0
    """By how much a decimal answer may differ from the gold one, in its own unit."""
    relative_tolerance: float = 0.0
    """By what share of the gold number an answer may differ, as Minerva's 0.01."""
    turns: tuple[Turn, ...] = ()
    """What stands in the prompt before the question: a system turn, and earlier turns of a conversation."""
    columns: dict[str, Any] | None = field(default=None, compare=False)
    """Columns of its row that a reward function asks for, as they stand there; None where none does."""

    @property
    def key(self) -> str:
        """A digest of question, gold and earlier turns: a problem has the same key wherever its row stands."""
        return problem_key(self.question, self.answer, self.turns)

    @property
    def whole_question(self) -> str:
        """The question with what was said before it in one text, for a reader who is not asked in turns."""
        if not self.turns:
            return self.question
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question behind what was said before it, as messages of a chat."""
        said = [*self.turns, Turn("user", self.question)]
        return [{"role": turn.role, "content": turn.text} for turn in said]


def problem_key(question: str, answer: str, turns: Sequence[Turn] = ()) -> str:
    """A digest of a question, its gold and the turns before it, spacing aside: 16 hexadecimal digits."""
    parts = [question, answer]
    for turn in turns:
        parts += [turn.role, turn.text]
    text = "\0".join(" ".join(part.split()) for part in parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Rollout:
    """One sampled completion of one prompt, graded."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Sampled tokens, the end-of-sequence token included when the student stopped by itself."""
    sampler_log_probs: tuple[float, ...]
    """Log-probability of each completion token under the whole distribution at the sampling temperature, not normalised
    to a nucleus. Empty where nobody asked for them."""
    text: str
    reward: float
    correct: bool
    truncated: bool
    """True when the token limit cut the completion before an end-of-sequence token."""
    policy_version: int
    scores: dict[str, float | None] = field(default_factory=dict, hash=False)
    """What each term of the reward gave, by name, where it has several; None where a term does not apply."""
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    """What reward functions noted of it."""


@dataclass(frozen=True)
class RolloutGroup:
    """A problem and its G rollouts."""

    problem: Problem
    rollouts: tuple[Rollout, ...]

    @property
    def num_correct(self) -> int:
        return sum(rollout.correct for rollout in self.rollouts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(len(rollout.completion_ids) for rollout in self.rollouts)

    @property
    def own_solution(self) -> str | None:
        """The shortest of the right and finished rollouts; None where there is none."""
        right = [rollout for rollout in self.rollouts if rollout.correct and not rollout.truncated]
        if not right:
            return None
        return min(right, key=lambda rollout: len(rollout.completion_ids)).text

    @property
    def all_zero(self) -> bool:
        """No rollout was accepted by the verifier: the group is harvested for critique."""
        return self.num_correct == 0

    @property
    def all_one(self) -> bool:
        """Every rollout was accepted: evidence of mastery."""
        return self.num_correct == len(self.rollouts)

    @property
    def informative(self) -> bool:
        """Rewards differ, so group advantages are not all zero (TRL: not counted in `frac_reward_zero_std`)."""
        return len({rollout.reward for rollout in self.rollouts}) > 1


@dataclass(frozen=True, slots=True)  # there may be a million
class Evidence:
    """What rollouts of one policy showed of one problem: `successes` out of `attempts`."""

    problem_id: str
    attempts: int
    successes: int
    policy_version: int = 0
    solution: str | None = None
    """The shortest of its right and finished rollouts."""
    tokens: int = 0
    """Of the completions; 0 where they were paid for by an earlier command."""

    @classmethod
    def of(cls, group: RolloutGroup) -> Evidence:
        """What a graded group shows."""
        return cls(
            problem_id=group.problem.id,
            attempts=len(group.rollouts),
            successes=group.num_correct,
            policy_version=group.rollouts[0].policy_version,
            solution=group.own_solution,
            tokens=group.num_tokens,
        )

    def with_more(self, more: Evidence) -> Evidence:
        """Together with further rollouts of the same policy; of two solutions the shorter text is kept."""
        solutions = [text for text in (self.solution, more.solution) if text is not None]
        return replace(
            self,
            attempts=self.attempts + more.attempts,
            successes=self.successes + more.successes,
            solution=min(solutions, key=len, default=None),
            tokens=self.tokens + more.tokens,
        )

    @property
    def rho(self) -> float:
        """The correctness rate, rho(q) of the method."""
        return self.successes / self.attempts


def wilson_interval(successes: float, attempts: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) when there was no attempt.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if attempts == 0:
        return 0.0, 1.0
    share, z2 = successes / attempts, z * z
    centre = (share + z2 / (2 * attempts)) / (1 + z2 / attempts)
    margin = z * math.sqrt(share * (1 - share) / attempts + z2 / (4 * attempts**2)) / (1 + z2 / attempts)
    return max(0.0, centre - margin), min(1.0, centre + margin)


TOKEN_KINDS = ("sampled", "trained", "written", "scored")
"""What tokens are counted as. The last is left out of tables and files where there are none."""


@dataclass
class Tokens:
    """What a run has cost so far, in tokens of its student. Measuring the benchmarks is no part of it."""

    sampled: int = 0
    """Drawn from the student: by probes, the Bridge and GRPO."""
    trained: int = 0
    """That went through a forward and a backward pass, prompts and targets."""
    written: int = 0
    """By the teacher: traces, rewrites and critiques, rejected ones too."""
    scored: int = 0
    """That went through the forward pass of `curriculum.probe.predictor`, prompts and traces."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __iadd__(self, other: Tokens) -> Tokens:
        for kind, count in vars(other).items():
            setattr(self, kind, getattr(self, kind) + count)
        return self

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(**{kind: count - getattr(other, kind) for kind, count in vars(self).items()})

    def as_summary(self) -> dict[str, int]:
        """By kind, as it stands in summary.json: `scored` only where anything was."""
        return {kind: count for kind, count in vars(self).items() if count or kind != "scored"}


@dataclass(frozen=True)
class Learnability:
    """How a trace looks to the student, over its T target tokens (arXiv 2601.14249)."""

    rank_surprisal_ratio: float
    """`sum(min(rank_t, 100)) / sum(-log p_t)`; lower is more learnable."""
    mean_nll: float
    """Mean negative log-likelihood in nats per token."""
    num_tokens: int


@dataclass(frozen=True, slots=True)  # there may be a million
class TraceScores:
    """How the trace that a problem has looks to one policy: what its correctness rate is predicted from."""

    problem_id: str
    mean_nll: float
    """Mean negative log-likelihood of the trace, in nats per token."""
    rank_surprisal_ratio: float
    """As of `Learnability`."""
    answer_nll: float
    """Negative log-likelihood of the final answer's tokens, given all before them, in nats."""
    num_tokens: int
    """Of the trace."""
    cost: int
    """Tokens that were read for it: prompt and trace."""
    policy_version: int = 0


@dataclass(frozen=True)
class Trace:
    """A worked solution, where it came from, and how learnable it is for the student that scored it."""

    problem_id: str
    text: str
    provenance: Provenance
    learnability: Learnability | None = None


@dataclass(frozen=True)
class Fault:
    """Why something was rejected. In a file it is one text, `part: kind: detail`, without what is empty."""

    kind: str
    """One of few, so that faults can be counted: `too long`."""
    detail: str = ""
    """What was seen: `600 tokens, the cap is 512`."""
    part: CritiqueKind | None = None
    """The part of a critique that it is about."""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.part, self.kind, self.detail)))

    @classmethod
    def read(cls, text: str) -> Fault:
        """The fault that a file has as a text."""
        first, _, rest = text.partition(": ")
        if first in CRITIQUE_KINDS:
            kind, _, detail = rest.partition(": ")
            return cls(kind, detail, first)
        return cls(first, rest)


def counted(kinds: Counter[str]) -> str:
    """How often each kind was seen, the most frequent first: `too long (3), not verified (1)`."""
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())


@dataclass(frozen=True)
class BridgeCandidate:
    """One proposal for a problem's trace, with why it was rejected, if it was."""

    trace: Trace
    """Scored under the student, rejected or not, unless it was too long."""
    rejected: Fault | None
    """None when the candidate passed every check."""
    num_steps: int = 0
    """Lines that are not blank."""


@dataclass(frozen=True)
class BridgeResult:
    """All candidates of one problem and the chosen one (None: every candidate was rejected).

    How learnable the problem was before the Bridge says the candidate from the `teacher`, after it the chosen trace.
    """

    problem: Problem
    candidates: tuple[BridgeCandidate, ...]
    chosen: Trace | None
    band: Band | None = None
    """Where the problem stood when its trace was made."""
    left_out: Fault | None = None
    """Why nothing was proposed, where something could have been."""


@dataclass(frozen=True)
class Diagnosis:
    """Where a failed attempt first goes wrong. Steps are the non-empty lines of the attempt, counted from 1."""

    wrong_step: int
    explanation: str
    verdict: Literal["right", "wrong"] = "wrong"


@dataclass(frozen=True)
class Exemplar:
    """A right solution in the student's own manner, shown to a teacher as style."""

    problem: Problem
    solution: str


@dataclass(frozen=True)
class Critique:
    """A failed attempt turned into three targets, with the faults of those that were rejected."""

    problem: Problem
    attempt: str
    diagnosis: Diagnosis | None
    prefix: str
    """The attempt's own text before its first wrong step, to the letter."""
    repair: str | None
    """What must follow `prefix` to reach the right answer."""
    new_trace: str | None
    rejected: tuple[Fault, ...] = ()
    """One for each part that is not there."""

    @property
    def kinds(self) -> tuple[CritiqueKind, ...]:
        found: list[CritiqueKind] = []
        if self.diagnosis is not None:
            found.append("diagnosis")
        if self.diagnosis is not None and self.repair is not None:
            found.append("repair")
        if self.new_trace is not None:
            found.append("new_trace")
        return tuple(found)


@dataclass(frozen=True)
class Example:
    """One supervised example: the loss is on `target_ids` alone."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    """Target tokens, the end-of-sequence token included."""
    problem_id: str
    origin: str
    """Why it is in the set: `teacher`, `bridged`, `handover`, `rationalised`, `self`, `review`, or a critique kind."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


@dataclass(frozen=True)
class Reject:
    """What was rejected, never silently: what, where and why."""

    id: str
    where: str
    reason: str
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def fault(self) -> Fault:
        """The reason, with its kind told apart: reasons of one kind are counted together."""
        return Fault.read(self.reason)
