r"""Which option of a multiple-choice problem a text chooses.

The letter must be the answer: in a box or tag, behind a marker, or the whole text. Markdown, brackets, lower case,
`option B` and a letter with its text are understood; two letters are a hedge, and a hedge chooses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from slmreason.verify.extract import MAX_TAIL_CHARS, places, without_thoughts
from slmreason.verify.notation import as_seen, squeeze, tidy
from slmreason.verify.quantities import exact

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_ANSWER_CHARS = 256
_WRAPPERS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|it|sf)|mbox|boxed|boldsymbol|bf)\s*\{?|[{}$*_`\"']|\\[()\[\]]|</?[a-z]+>"
)
_OPTION = re.compile(
    r"^(?:the\s+)?(?:correct\s+)?(?:option|choice|answer|alternative|letter)?\s*(?:is\s*)?[:#]?\s*", re.I
)
_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*(?:[)\]]|(?![A-Za-z0-9'^_]))\s*([.:,;)\]-]?)\s*(.*)", re.DOTALL)
_ALSO = re.compile(
    r"(?:\s|[,/&|+;]|\b(?:and|or|nor|maybe|possibly|perhaps|either|both|then|also)\b)*(?:option|choice|answer)?\s*"
    r"[(\[]?([A-Za-z])[)\]]?(?=\s*(?:[.,;:!?)/&]|$|\b(?:and|or)\b))",
    re.I,
)
_PLAIN_PROSE = re.compile(r"[a-z]+\b")
_REASONS = re.compile(r"(?:because|since|as|is|which|for|so|with|that|due|given|where|and|or|means|matches)\b", re.I)
_CHOSEN = re.compile(
    r"\b(?:correct|right|best|chosen)?\s*\b(?:option|choice|alternative)\b\s*"
    r"(?:is|:|would be|must be|should be)\s*[*_:\s]*"
    r"(?=[(\[*_$\\]*[A-Za-z]\b)|\b(?:choose|select|pick)\s+(?:option|choice)?\s*(?=[(\[*_]*[A-Z]\b)",
    re.I,
)
_DECLARED = re.compile(r"\b(?:option|choice)\s+[*_(]*([A-Z])[*_)]*\s+is\s+(?:the\s+)?(?:correct|right|best)", re.I)


def choice_letter(answer: str, num_options: int = len(LETTERS)) -> str | None:
    r"""The option letter of `C`, `(C)`, `c)`, `C) Ann`, `Option C`, `\text{C}`; None for anything else, a hedge too."""
    if len(answer) > MAX_TAIL_CHARS:
        answer = answer[:MAX_TAIL_CHARS]
    plain = " ".join(_WRAPPERS.sub(" ", answer).split()).strip(" .")
    named = _OPTION.match(plain)
    is_named = named is not None and named.end() > 0
    plain = plain[named.end() :] if named else plain
    match = _LETTER.fullmatch(plain)
    if match is None:
        return None
    letter, mark, rest = match.group(1), match.group(2), match.group(3)
    if letter.upper() not in LETTERS[:num_options]:
        return None
    is_bracketed = plain[:1] in "([" or mark in (")", "]")
    if rest and not is_named and not is_bracketed and not mark and not _REASONS.match(rest):
        # "A triangle" begins with an article, "B 12" with a letter.
        if letter in "aAiI" and _PLAIN_PROSE.match(rest):
            return None
        if letter.islower():
            return None
    other = _ALSO.match((mark if mark in ",/&;" else "") + " " + rest) if rest else None
    if other and other.group(1).upper() in LETTERS[:num_options] and other.group(1).upper() != letter.upper():
        is_article = other.group(1) in "aAI" and not other.group().strip(" ,;/&").isalpha()
        if not is_article or rest.strip().upper() == other.group(1).upper():
            return None
    return letter.upper()


def chosen(text: str, options: Sequence[str] = (), num_options: int = 0, truncated: bool = False) -> str | None:
    """The letter of the option that a completion chooses; None when it chooses none, or more than one.

    Args:
        options: texts of the options; an answer that is the text of exactly one of them chooses it.
        num_options: how many options there are, where their texts are not known.
        truncated: the text was cut off at the token limit, so only a finished answer counts.
    """
    text = without_thoughts(as_seen(text))
    count = len(options) or num_options or len(LETTERS)
    for place in places(text):
        content = place.content.strip()
        if not content or len(content) > MAX_TAIL_CHARS or (truncated and place.ends_text):
            continue
        letter = _read(content, options, count)
        if letter is not None or place.is_whole:
            return letter
    if truncated:
        return None
    if len(text) <= MAX_ANSWER_CHARS and "\n" not in text.strip():
        letter = _read(text.strip(), options, count)
        if letter is not None:
            return letter
    return _declared(text[-MAX_TAIL_CHARS:], options, count)


def _read(content: str, options: Sequence[str], count: int) -> str | None:
    by_text = next((letter for part in _phrases(content) if (letter := option_of(part, options))), None)
    letter = choice_letter(content, count)
    if letter is None:
        return by_text
    # A letter with the text of another option is a hedge.
    rest = _LETTER.fullmatch(_OPTION.sub("", " ".join(_WRAPPERS.sub(" ", content).split()).strip(" .")))
    named = option_of(rest.group(3), options) if rest and rest.group(3) else None
    return letter if named in (None, letter) else None


def _phrases(content: str) -> list[str]:
    """A text, and what it begins with: without its article, and up to where its sentence ends or gives a reason."""
    start = re.split(r"[.,;!?](?:\s|$)|\s(?:because|since|as)\s", content, maxsplit=1)[0]
    return list(dict.fromkeys(re.sub(r"^(?:an?|the)\s+", "", part, flags=re.I) for part in (content, start)))


def option_of(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the one option whose text or number an answer is."""
    if not options or len(answer) > MAX_ANSWER_CHARS:
        return None
    mine = tidy(answer)
    if not mine:
        return None
    equal = [LETTERS[i] for i, option in enumerate(options[: len(LETTERS)]) if _same_option(mine, tidy(option))]
    return equal[0] if len(equal) == 1 else None


def _same_option(mine: str, option: str) -> bool:
    if squeeze(mine).lower() == squeeze(option).lower():
        return True
    first, second = exact(mine), exact(option)
    return (
        first is not None
        and second is not None
        and first.value == second.value
        and first.is_percent == second.is_percent
    )


def _declared(text: str, options: Sequence[str], count: int) -> str | None:
    """The option that the end of a text without a marker names: `The correct option is B.`, `Option B is correct`."""
    letters = set()
    for found in _DECLARED.finditer(text):
        letters.add(found.group(1).upper())
    for found in _CHOSEN.finditer(text):
        letter = _read(text[found.end() :].partition("\n")[0], options, count)
        letters |= {letter} if letter else set()
    if not letters:
        last = text.strip().rpartition("\n")[2]
        letter = _read(last, options, count) if len(last) <= MAX_ANSWER_CHARS else None
        letters |= {letter} if letter else set()
    (only,) = letters if len(letters) == 1 else (None,)
    return only
