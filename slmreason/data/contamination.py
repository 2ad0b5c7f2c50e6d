"""Training problems that stand in a benchmark too: a score on those would measure memory."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from slmreason.records import Problem

_NUMBER_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_DISPLAY = re.compile(r"\\[dt](?=frac)")
_SPACING = re.compile(r"\\(?:left|right|[!,;: ])")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/=<>^%!(){}|\[\]\\]")


def contaminated(problems: Sequence[Problem], benchmarks: Mapping[str, Iterable[Problem]]) -> dict[str, str]:
    """The problems whose question a benchmark asks as well, by id: which one, and whether to the letter.

    Args:
        benchmarks: the problems of each by its name.
    """
    exact = {p.question: (name, p.id) for name, asked in benchmarks.items() for p in asked}
    normalised = {normalise(question): place for question, place in exact.items()}
    found = {}
    for problem in problems:
        if problem.question in exact:
            found[problem.id] = "contamination: stands in benchmark {}, as {}".format(*exact[problem.question])
        elif place := normalised.get(normalise(problem.question)):
            found[problem.id] = "contamination but for spelling: stands in benchmark {}, as {}".format(*place)
    return found


def normalise(question: str) -> str:
    """A question without what does not change it: case, spacing, punctuation, dollar signs, how a number is set.

    Signs of arithmetic and brackets stay: `3 + 4` and `3 - 4` are two questions.
    """
    text = unicodedata.normalize("NFKC", question).casefold().replace("\u2212", "-").replace("\u2013", "-")
    text = _SPACING.sub(" ", _DISPLAY.sub(r"\\", text))
    return " ".join(_TOKEN.findall(_NUMBER_COMMA.sub("", text)))
