"""Training problems that stand in a benchmark too: a score on those would measure memory."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from slmreason.records import Problem

_RAISED = re.compile("([⁰¹²³⁴-⁹]+)")
_LOWERED = re.compile("([₀-₉]+)")
_NUMBER_COMMA = re.compile(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))")
_DISPLAY = re.compile(r"\\[dt](?=frac)")
_SPACING = re.compile(r"\\(?:(?:left|right|quad|qquad)(?![a-z])|[!,;: ])|(?<=[^\W\d_]{3})-(?=[^\W\d_]{3})")
_NO_SIGN = re.compile(r"\\(?=[$%])|\.(?!\d)|(?<=[^\W\d_])\.|(?<=[^\W\d_]{2})!")
_BETWEEN = re.compile(r"(?<![\d.])\s+|\s+(?![\d.])")


def contaminated(problems: Sequence[Problem], benchmarks: Mapping[str, Iterable[Problem]]) -> dict[str, str]:
    """The problems whose question a benchmark asks as well, by id: which one, and whether to the letter.

    Args:
        benchmarks: the problems of each by its name.
    """
    exact = {_said(p): (name, p.id) for name, asked in benchmarks.items() for p in asked}
    normalised = {form: place for question, place in exact.items() if (form := normalise(question))}
    found = {}
    for problem in problems:
        said = _said(problem)
        if said in exact:
            found[problem.id] = "contamination: stands in benchmark {}, as {}".format(*exact[said])
        elif place := normalised.get(normalise(said)):
            found[problem.id] = "contamination but for spelling: stands in benchmark {}, as {}".format(*place)
    return found


def _said(problem: Problem) -> str:
    """The question with the conversation before it, without a system turn: that does not make it another question."""
    earlier = [turn.text for turn in problem.turns if turn.role != "system"]
    return "\n".join([*earlier, problem.question])


def normalise(question: str) -> str:
    """A question without what does not change it: case, spacing, punctuation, dollar signs, how a number is set.

    Letters of every script, numbers, signs of arithmetic and brackets stay, and so does a space between two numbers:
    `3 + 4` and `3 - 4` are two questions, and so are `1.5`, `1 5` and `15`. Empty when there is none of these.
    """
    text = _LOWERED.sub(r"_\1", _RAISED.sub(r"^\1", question))  # NFKC makes 52 of 5 squared
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    for pattern, instead in ((_NUMBER_COMMA, ""), (_DISPLAY, r"\\"), (_SPACING, " "), (_NO_SIGN, " ")):
        text = pattern.sub(instead, text)
    text = _BETWEEN.sub("", text.translate(_KEPT)).strip()
    return text if any(map(str.isalnum, text)) else ""


class _Kept(dict[int, str]):
    """What becomes of a character, worked out when it is first met."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        kind = unicodedata.category(letter)
        if letter == "−" or (kind == "Pd" and letter != "—"):
            self[code] = "-"
        else:
            kept = letter in "*/%!.(){}[]\\" or (kind[0] in "LMNS" and letter not in "$~`")
            self[code] = letter if kept else " "
        return self[code]


_KEPT = _Kept()
