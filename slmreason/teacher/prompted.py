"""A teacher that is a stronger language model: what it is asked, and how its answers are read.

Where the model runs is a subclass's affair, which does no more than answer conversations, a batch at a time.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slmreason.records import Diagnosis, Exemplar, Problem, Reject
from slmreason.teacher.base import Teacher
from slmreason.teacher.dataset import without_thoughts
from slmreason.teacher.procedural import split_steps
from slmreason.verify.answers import last_boxed

T = TypeVar("T")
Kind = Literal["solve", "bridge", "locate", "repair", "new_trace"]
Conversation = list[dict[str, str]]
"""Messages with `role` and `content`, as chat APIs and chat templates take them."""

PROMPTS = Path(__file__).parent / "prompts"
COMMON = {"question": "1 + 1?", "answer": "2", "choices": None}
FIELDS: dict[Kind, dict[str, Any]] = {
    "solve": {},
    "bridge": {"trace": "1 + 1 = 2", "exemplars": [{"question": "1 + 2?", "solution": "1 + 2 = 3"}]},
    "locate": {"attempt": "1 + 1 = 3", "steps": ["1 + 1 = 3"]},
    "repair": {"prefix": "1 + 0 = 1\n", "wrong_step": 2, "explanation": "1 + 1 is 2."},
    "new_trace": {},
}
"""The variables of each prompt besides the common ones, with values to try a template on."""
METHODS: dict[str, Kind] = {kind: kind for kind in FIELDS if kind != "bridge"} | {"rewrite": "bridge"}
"""The prompt that each method of a teacher uses."""
MADE_UP_CHARS = 600
"""Length of a trace, an attempt or a prefix that is not there yet, where costs are estimated."""
KEPT_CHARS = 2000
"""So much of an answer that could not be used is kept with the reason."""


class TeacherError(RuntimeError):
    """The teacher cannot be asked at all, which asking for one more problem will not change."""


class Unusable(ValueError):
    """An answer that cannot be used. The message is for the model that gave it, and for the record."""


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    text: str
    truncated: bool = False
    """True when a token limit cut it off."""
    refusal: str | None = None
    """Why there is no answer, where the model or its server refused to give one."""


@dataclass(frozen=True)
class Failure:
    """Why a conversation got no answer."""

    reason: str


class LLMTeacher(Teacher):
    """Asks a language model, and reads what it says.

    An answer that cannot be read is asked for once more, with what is wrong with it; then it is rejected.
    """

    def __init__(self, prompts: Mapping[str, str] | None = None) -> None:
        """
        Raises:
            ValueError: a prompt cannot be read or uses a variable that there is not; the message names it.
        """
        self._templates = load_prompts(prompts or {})
        self._rejects: list[Reject] = []

    @abstractmethod
    def chat(self, kind: str, conversations: Sequence[Conversation]) -> list[Answer | Failure]:
        """The model's next message in each conversation, in their order.

        Args:
            kind: what is asked for, in a word, for those who watch.

        Raises:
            TeacherError: no conversation can be answered, whatever is asked.
        """

    def conversation(self, kind: Kind, problem: Problem, **fields: Any) -> Conversation:
        """What is asked of the model, with the variables of that prompt (`FIELDS`) besides the problem's own."""
        text = self._templates[kind].render(
            question=problem.whole_question, answer=problem.answer, choices=problem.choices, **fields
        )
        return [{"role": "user", "content": whole_characters(text.strip())}]

    def expected(self, method: str, problems: Sequence[Problem]) -> list[Conversation]:
        """What the model would be asked by a method; what is not there yet, such as a trace, is made up.

        Raises:
            ValueError: there is no such method.
        """
        if method not in METHODS:
            raise ValueError(f"a teacher has no method {method!r}; there are {', '.join(METHODS)}")
        kind = METHODS[method]
        made_up = (f"{number} ".ljust(MADE_UP_CHARS, "x") for number in range(len(problems)))
        return [
            self.conversation(kind, problem, **FIELDS[kind] | {"trace": text, "steps": [text], "prefix": text})
            for problem, text in zip(problems, made_up, strict=True)
        ]

    def solve(self, problems: Sequence[Problem]) -> list[str | None]:
        return self._ask("solve", problems, [{}] * len(problems), [read_trace] * len(problems))

    def rewrite(
        self, problems: Sequence[Problem], raw_traces: Sequence[str], exemplars: Sequence[Exemplar]
    ) -> list[str | None]:
        shown = [{"question": e.problem.whole_question, "solution": e.solution.strip()} for e in exemplars]
        fields = [{"trace": trace, "exemplars": shown} for trace in raw_traces]
        return self._ask("bridge", problems, fields, [read_trace] * len(problems))

    def locate(self, problems: Sequence[Problem], attempts: Sequence[str]) -> list[Diagnosis | None]:
        steps = [split_steps(attempt) for attempt in attempts]
        fields = [{"attempt": attempt, "steps": s} for attempt, s in zip(attempts, steps, strict=True)]
        return self._ask("locate", problems, fields, [partial(read_diagnosis, num_steps=len(s)) for s in steps])

    def repair(
        self, problems: Sequence[Problem], prefixes: Sequence[str], diagnoses: Sequence[Diagnosis]
    ) -> list[str | None]:
        fields = [
            {"prefix": prefix, "wrong_step": diagnosis.wrong_step, "explanation": diagnosis.explanation}
            for prefix, diagnosis in zip(prefixes, diagnoses, strict=True)
        ]
        return self._ask("repair", problems, fields, [partial(read_repair, prefix=prefix) for prefix in prefixes])

    def new_trace(self, problems: Sequence[Problem]) -> list[str | None]:
        return self._ask("new_trace", problems, [{}] * len(problems), [read_trace] * len(problems))

    def drain_rejects(self) -> list[Reject]:
        """Why there was no answer, for each answer that there was not since the last call."""
        rejects, self._rejects = self._rejects, []
        return rejects

    def _ask(
        self,
        kind: Kind,
        problems: Sequence[Problem],
        fields: Sequence[Mapping[str, Any]],
        readers: Sequence[Callable[[str], T]],
    ) -> list[T | None]:
        """Asks for each problem, reads the answers, asks again for those that cannot be read."""
        asked = {i: self.conversation(kind, p, **f) for i, (p, f) in enumerate(zip(problems, fields, strict=True))}
        found: dict[int, T] = {}
        faults: dict[int, Reject] = {}
        for last in (False, True):
            again: dict[int, Conversation] = {}
            answers = self.chat(kind, list(asked.values())) if asked else []
            for (i, conversation), answer in zip(asked.items(), answers, strict=True):
                location = problems[i].id, f"teacher {kind}"
                if isinstance(answer, Failure):
                    faults[i] = Reject(*location, answer.reason)
                    continue
                try:
                    found[i] = readers[i](answer_text(answer))
                except Unusable as error:
                    faults[i] = Reject(*location, str(error), {"answer": answer.text[:KEPT_CHARS]})
                    if not last and not answer.truncated and not answer.refusal:  # asked again it would be so again
                        again[i] = [*conversation, *_complaint(answer, error)]
            asked = again
        self._rejects += [faults[i] for i in range(len(problems)) if i not in found]
        return [found.get(i) for i in range(len(problems))]


def _complaint(answer: Answer, error: Unusable) -> Conversation:
    return [
        {"role": "assistant", "content": whole_characters(answer.text.strip()) or "(nothing)"},
        {"role": "user", "content": f"This cannot be used: {error}. Answer again, in the form that was asked for."},
    ]


# -- prompts --------------------------------------------------------------------------------------------------------


def load_prompts(overrides: Mapping[str, str]) -> dict[Kind, Template]:
    """The template of each kind: the package's own, or the file that `overrides` names.

    Raises:
        ValueError: a kind does not exist, a file cannot be read, or its template is wrong; the message names the key.
    """
    if unknown := sorted(set(overrides) - set(FIELDS)):
        raise ValueError(f"teacher.prompts: there is no prompt {unknown[0]!r}; there are {', '.join(FIELDS)}")
    return {kind: _load(kind, Path(overrides.get(kind, PROMPTS / f"ask_{kind}.jinja"))) for kind in FIELDS}


def _load(kind: Kind, path: Path) -> Template:
    # Plain text for a language model, not HTML: nothing is escaped. A recipe of someone else's may bring templates.
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    known = COMMON | FIELDS[kind]
    try:
        source = path.read_text(encoding="utf-8")
        used = meta.find_undeclared_variables(environment.parse(source)) - set(environment.globals)
        if unknown := sorted(used - set(known)):
            raise ValueError(f"there is no variable {unknown[0]!r}; there are {', '.join(sorted(known))}")
        template = environment.from_string(source)
        empty = {name: value[:0] if isinstance(value, str | list) else value for name, value in FIELDS[kind].items()}
        for fields in (known, COMMON | empty, known | {"choices": ("1", "2")}):
            template.render(fields)
    except (OSError, UnicodeDecodeError, TemplateError, ValueError) as error:
        raise ValueError(f"teacher.prompts.{kind}: {path}: {error}") from error
    return template


# -- answers --------------------------------------------------------------------------------------------------------

_FENCED = re.compile(r"```\w*\n((?:(?!```).)*)```", re.DOTALL)


def answer_text(answer: Answer) -> str:
    """What an answer says once its thoughts are over.

    Raises:
        Unusable: it was refused or cut off, its thoughts do not end, or it is empty.
    """
    if answer.refusal:
        raise Unusable(answer.refusal)
    if answer.truncated:
        raise Unusable("the answer was cut off at the token limit")
    said = whole_characters(answer.text)
    try:
        text = (without_thoughts(said) or said).strip()
    except ValueError as error:
        raise Unusable(str(error)) from error
    if not text:
        raise Unusable("the answer is empty")
    return text


def whole_characters(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which can neither be sent nor tokenized."""
    return text.encode("utf-8", "replace").decode()


def read_trace(text: str) -> str:
    r"""A worked solution.

    Raises:
        Unusable: it has no final answer in `\boxed{}`.
    """
    fenced = _FENCED.fullmatch(text)
    trace = fenced.group(1).strip() if fenced else text
    if not (last_boxed(trace) or "").strip():
        raise Unusable(r"there is no final answer in \boxed{}")
    return trace


def read_repair(text: str, prefix: str) -> str:
    """What follows the prefix; steps of the prefix that the model repeats are dropped.

    Raises:
        Unusable: nothing follows, or no final answer does.
    """
    rest = without_prefix(read_trace(text), prefix)
    if not rest:
        raise Unusable("it repeats the steps so far and does not go on")
    return read_trace(rest)


def without_prefix(text: str, prefix: str) -> str:
    """The text without the steps at its beginning that are the last ones of the prefix, spacing and numbering aside."""
    before = [_bare(line) for line in split_steps(prefix)]
    lines = text.splitlines(keepends=True)
    places = [place for place, line in enumerate(lines) if line.strip()]
    said = [_bare(lines[place]) for place in places]
    overlaps = range(min(len(before), len(said)), 0, -1)
    repeated = next((n for n in overlaps if before[-n:] == said[:n]), 0)
    return "".join(lines[places[repeated - 1] + 1 :] if repeated else lines).strip()


def _bare(line: str) -> str:
    return "".join(re.sub(r"^\W*(?:step\s*)?\d+[.):]\s+", "", line.strip(), flags=re.IGNORECASE).split())


def read_diagnosis(text: str, num_steps: int) -> Diagnosis:
    """The diagnosis in an answer's JSON object.

    Raises:
        Unusable: there is no such object, or what it says is no diagnosis of so many steps.
    """
    objects, fault = read_objects(text)
    found = next((o for o in reversed(objects) if "wrong_step" in o), None)
    if found is None:
        raise Unusable(f"no JSON object with the key wrong_step can be read{': ' + fault if fault else ''}")
    explanation = str(found.get("explanation") or "").strip()
    verdict = _verdict(found.get("verdict"))
    if verdict == "right":
        return Diagnosis(0, explanation, verdict)
    step = _whole_number(found["wrong_step"])
    if step is None or not 1 <= step <= num_steps:
        raise Unusable(f"wrong_step is {found['wrong_step']!r}, where a step from 1 to {num_steps} is asked for")
    if not explanation:
        raise Unusable("the explanation is missing")
    return Diagnosis(step, explanation, verdict)


def _verdict(value: Any) -> Literal["right", "wrong"]:
    said = str("wrong" if value is None else value).strip().lower()
    if said in ("wrong", "incorrect", "false"):
        return "wrong"
    if said in ("right", "correct", "true"):
        return "right"
    raise Unusable(f'the verdict is {value!r}, where "wrong" or "right" is asked for')


def _whole_number(value: Any) -> int | None:
    match = re.fullmatch(r"(?:step)?\s*#?(\d{1,6})(?:\.0*)?", str(value).strip(), re.IGNORECASE)
    return int(match.group(1)) if match else None


# -- JSON as models write it ----------------------------------------------------------------------------------------

_LATEX = r"[bf][a-z]|n(?:eq?|ot|u)\b|r(?:ight|ho)|t(?:imes|ext|heta|frac|an|o\b)|u(?![0-9a-fA-F]{4})"
_BACKSLASH = re.compile(rf'\\\\|\\(?={_LATEX}|[^"\\/bfnrtu])')
_TRAILING_COMMA = re.compile(r",(?=\s*[}\]])")


def read_objects(text: str) -> tuple[list[dict[str, Any]], str]:
    """Every JSON object in a text, and why the first thing that looks like one cannot be read ("" if it can).

    Objects come in the order in which they begin, nested ones after the one they are in. Trailing commas are forgiven,
    and so are LaTeX's backslashes.
    """
    # The explanations are about mathematics: \frac in a string is not a form feed and "rac".
    text = _TRAILING_COMMA.sub("", _BACKSLASH.sub(r"\\\\", text))
    decoder, found, fault = json.JSONDecoder(strict=False), [], "" if "{" in text else "there is none"
    for match in re.finditer(r"\{", text):
        try:
            found.append(decoder.raw_decode(text, match.start())[0])
        except (ValueError, RecursionError) as error:
            fault = fault or str(error)
    return found, fault
