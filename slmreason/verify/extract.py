r"""Where a text gives its answer: the last box or tag, else what a marker says, else the last expression.

A match is no answer until an expression stands in it: `answered 9 questions`, `I believe that's the answer` and
`#### Step 2: conclude` are passed over. What a model thinks (`<think>`) is never read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from slmreason.verify.notation import as_seen, last_box
from slmreason.verify.quantities import _PARTS, _SCALES, _WORD_VALUES

MAX_TAIL_CHARS = 400
"""So much behind a marker is read, and so much at the end of a text without one."""
MAX_PHRASE_WORDS = 6
_THOUGHT_END = re.compile(
    r"</\s*(?:think|thinking|thought|reasoning|scratchpad)\s*>|<\|end_of_thought\|>|\[/THINK\]", re.I
)
_THOUGHT_START = re.compile(
    r"<\s*(?:think|thinking|thought|reasoning|scratchpad)\s*>|<\|begin_of_thought\|>|\[THINK\]", re.I
)
_TAGGED = re.compile(r"<(answer|final_answer)>((?:(?!<\1>).)*?)</\1>", re.DOTALL | re.I)
_OPEN_TAG = re.compile(r"<(?:answer|final_answer)>", re.I)
_HASHES = re.compile(r"####(?!#)")
_LETTER_A = re.compile(r"^[ \t]*\**A\**:\**", re.MULTILINE)
_ANSWER = re.compile(r"(?<![a-zA-Z\\])answers?(?![a-zA-Z])", re.I)
_FILLER = (
    r"(?:\s*(?:indeed|then|therefore|thus|hence|simply|just|also|still|approximately|about|roughly|exactly|only|now"
    r"|equal to|given by|as follows|the following|option|choice|the number|the value|a total of)\b)*"
)
_LINK = re.compile(
    r"(?!\s+(?:choices?|options?|key|sheet)\b)"
    r"(?:[*_`\s]*(?:[:=]|\bis\b(?!n't|\s+not\b)|-(?=\s))"
    r"|(?:[^.\n:=!?]|\.(?=\d)){0,80}?(?:\b(?:is|are|was|equals|becomes|must be|should be|would be|will be|can be"
    r"|has to be|comes to|comes out to be|turns out to be)\b(?!n't|\s+not\b)|[:=])"
    r"|[*_`]*\s*(?=\n))"
    r"[\s*_`:>]*" + _FILLER + r"[\s*_`:>]*",
    re.I,
)
_ENUMERATED = re.compile(r"\s*(?:\d+[.)]\s+[a-zA-Z]|step\b)", re.I)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n\s*\n")


_EMPTY_BOX = re.compile(r"\\f?box(?:ed)?\s*\{\s*\}")


class Found(NamedTuple):
    """A place that claims to hold the answer."""

    content: str
    is_whole: bool
    """The content is the answer and nothing else (a box, a tag); else the answer leads it (behind a marker)."""
    ends_text: bool = False
    """Nothing follows it, so that a text that was cut off may have been cut within it."""


def without_thoughts(text: str) -> str:
    """What a model says after it has thought; nothing of a thought that never ends."""
    ends = [found.end() for found in _THOUGHT_END.finditer(text)]
    if ends:
        text = text[ends[-1] :]
    start = _THOUGHT_START.search(text)
    return text[: start.start()] if start else text


def places(text: str) -> Iterator[Found]:
    """Every place of a text without thoughts that claims to hold its answer, the most reliable first."""
    boxed = last_box(text)
    tagged = list(_TAGGED.finditer(text))
    if tagged and (boxed is None or tagged[-1].start() > boxed[1]):
        yield Found(tagged[-1].group(2), is_whole=True)
    if boxed is not None:
        yield Found(boxed[0], is_whole=True)
    if tagged:
        return
    opened = list(_OPEN_TAG.finditer(text))
    if opened:
        yield _behind(text, opened[-1].end())
    marks = [(found.start(), found.end()) for pattern in (_HASHES, _LETTER_A) for found in pattern.finditer(text)]
    for answer in _ANSWER.finditer(text):
        link = _LINK.match(text, answer.end())
        if link:
            marks.append((answer.start(), link.end()))
    for start, end in sorted(marks, reverse=True):
        is_heading = text.startswith("#", start) and _ENUMERATED.match(text, end)
        if not is_heading:
            yield _behind(text, end)


def _behind(text: str, at: int) -> Found:
    """The line behind a marker, or the next one that is not blank."""
    rest = text[at : at + MAX_TAIL_CHARS]
    content = rest.lstrip()
    for opening, closing in (("$$", "$$"), (r"\[", r"\]")):  # displayed mathematics may take several lines
        if content.startswith(opening) and closing in content[2:]:
            end = content.index(closing, 2) + 2
            return Found(content[:end] + content[end:].partition("\n")[0], is_whole=False)
    line, _, after = content.partition("\n")
    return Found(line, is_whole=False, ends_text=not after and len(text) - at <= MAX_TAIL_CHARS)


def final_answer(text: str, truncated: bool = False, words: bool = False) -> str | None:
    """The part of a completion that counts as its answer; None when there is none.

    Args:
        truncated: the text was cut off at the token limit: only a finished answer (box, tag or marker) counts.
        words: the answer may be words, as `Evelyn`; else only expressions are answers, unless they stand in a box.
    """
    text = _EMPTY_BOX.sub("", without_thoughts(as_seen(text)))
    for place in places(text):
        content = place.content.strip()
        answer = _whole(content) if place.is_whole else leading_expression(content)
        if answer is not None:
            is_cut = truncated and place.ends_text and content.rstrip().endswith(answer[-1:])
            if not is_cut:
                return _without_currency(answer)
        elif words and not place.is_whole and not (truncated and place.ends_text):
            phrase = _leading_words(content)
            if phrase is not None:
                return phrase
    if truncated:
        return None
    if words and len(text.split()) <= MAX_PHRASE_WORDS:
        return _leading_words(text.strip())
    last = last_expression(text[-MAX_TAIL_CHARS:])
    return None if last is None else _without_currency(last)


def _without_currency(answer: str) -> str:
    return answer.lstrip("$ ") if re.match(r"\$\s*[-\d.]", answer) and answer.count("$") == 1 else answer


def _whole(content: str) -> str | None:
    """What a box or a tag holds; where that is a sentence, its answer."""
    if not content:
        return None
    if len(content) <= MAX_TAIL_CHARS and re.search(r"[a-z]{2,}\s+[a-z]{2,}", content):
        inner = [leading_expression(place.content.strip()) for place in places(content) if not place.is_whole]
        return next((answer for answer in inner if answer is not None), content)
    return content if re.search(r"\w|\\emptyset|∅", content) else None


# Expressions in prose -------------------------------------------------------------------------------------------------

_DOLLARS = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_PROSE = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}(?:\s+[a-zA-Z]{2,})")
_NAMES = r"sqrt|pi|sin|cos|tan|log|ln|exp|infinity|inf|mod"
_ATOM = re.compile(
    rf"\\[a-zA-Z]+\*?|\\[{{}}%$,;:! ]|\d+(?:,\d+)*(?:\.\d+)?|\.\d+|(?:{_NAMES})(?![a-zA-Z])"
    r"|[a-zA-Z](?![a-zA-Z'])|[-+*/^_=<>!|(){}\[\]%°√∛π∞±≤≥≠≈×·÷½⅓⅔¼¾⅛⅜⅝⅞∪∩∈²³⁴⁵⁶⁷⁸⁹⁰¹\u0304\u0305]|[€£¥₹]|\$(?=\s*[-\d.])|(?<=\d):(?=\d)"
)
_ARGUMENT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|mbox)\s*\{[^{}]*\}")
_UNIT_WORDS = re.compile(
    r"\s*((?!(?:and|or|because|since|as|so|which|where|for|if|when|then|that|but|is|are|was|to|from|with|than)\b)"
    r"[a-zA-Z][a-zA-Z.'-]*(?:\s*[/ ]\s*"
    r"(?!(?:and|or|because|since|as|so|which|where|if|when|then|that|but|is|are|was|with)\b)[a-zA-Z]+){0,4})"
)
_CONTINUES = re.compile(r"\s*(,?\s*(?:and|or)\b|[,;](?=\s)|&)\s*")
_BOUNDS = {
    "at least": r"\ge", "no less than": r"\ge", "at most": r"\le", "no more than": r"\le", "more than": ">",
    "greater than": ">", "less than": "<", "fewer than": "<", "not": r"\ne",
}  # fmt: skip
_BOUND = re.compile(rf"({'|'.join(_BOUNDS)})\b\s*", re.I)
_NUMBER_WORD = "|".join([*_WORD_VALUES, *_SCALES, *_PARTS, "minus", "negative"])
_NUMBER_WORDS = re.compile(
    rf"(?:a\s+(?=half|third|quarter|dozen))?(?:(?:{_NUMBER_WORD})\b(?!\s+of\b)(?:[\s-]+(?:and\s+)?)?)+", re.I
)
_SCALE_WORD = re.compile(rf"\s*(?:{'|'.join(_SCALES)})s?\b|\s*(?:percent|per cent|%)", re.I)


def leading_expression(text: str) -> str | None:
    """The expression, or list of them, with which a text begins; the words behind it are left out.

    `7 dollars per hour` is 7, `2, since 1+1=2.` is 2, `$4$, $-2$ and $10$` is a list, `9 million` keeps its word.
    None when the text begins with anything else.
    """
    text = re.sub(r"^(?:\*\*|__|[`:>]|=(?!=)|\\approx\b|≈|~|\s)+", "", text)
    bound = _BOUND.match(text)
    if bound:  # `at least 5` is no 5
        inner = leading_expression(text[bound.end() :])
        return None if inner is None else f"{_BOUNDS[bound.group(1).lower()]} {inner}"
    items: list[str] = []
    at = 0
    while len(items) < 32:
        read = _item(text, at)
        if read is None:
            break
        item, end, words_end = read
        if items and not _ends_an_item(text, words_end):
            break
        items.append(item)
        joint = _CONTINUES.match(text, words_end) or _CONTINUES.match(text, end)
        if joint is None:
            break
        at = joint.end()
    return ", ".join(items) if items else None


def _ends_an_item(text: str, at: int) -> bool:
    """Whether what stands at `at` can follow an item of a list: a separator or the end of the sentence."""
    return re.match(r"[\s*_`'\"]*(?:$|[.!?;,)&]|and\b|or\b|\n|</?[a-z]|\\)", text[at:]) is not None


def _item(text: str, at: int) -> tuple[str, int, int] | None:
    """(expression, its end, the end of its unit words) at a place of a text; None when none begins there."""
    found = _DOLLARS.match(text, at)
    if found and not _PROSE.search(_ARGUMENT.sub("", found.group())):
        content = next(group for group in found.groups() if group is not None)
        end = found.end()
    else:
        words = _NUMBER_WORDS.match(text, at)
        if words and _ends_an_item(text, _skip_units(text, words.end())):
            return words.group().strip(" -"), words.end(), _skip_units(text, words.end())
        end = _plain_end(text, at)
        content = text[at:end].strip().rstrip("*_`")
    if not _is_expression(content):
        return None
    scale = _SCALE_WORD.match(text, end)
    if scale:
        content, end = content + scale.group(), scale.end()
    return content.strip(), end, _skip_units(text, end)


def _skip_units(text: str, at: int) -> int:
    units = _UNIT_WORDS.match(text, at)
    return units.end() if units else at


def _plain_end(text: str, at: int) -> int:
    """Where the run of mathematics without dollar signs that begins at `at` ends."""
    end = at
    depth = 0
    while at < len(text):
        atom = _ARGUMENT.match(text, at) or _ATOM.match(text, at)
        if atom is not None:
            depth += sum((c in "([{") - (c in ")]}") for c in atom.group() if len(atom.group()) <= 2)
            if depth < 0:
                break
            at = end = atom.end()
        elif text[at] in " \t" or (text[at] in "\n," and depth > 0):
            at += 1
        elif text[at] in ",&\\" and depth > 0:
            at = end = at + 1
        elif depth > 0 and text[at].isalpha():
            word = re.match("[a-zA-Z]+", text[at:])
            if word is None:
                break
            at = end = at + word.end()
        else:
            break
    plain = text[:end].rstrip()
    while plain.endswith(("=", "+", "-", "*", "/", "(", "_", "!")):  # `!` ends a sentence here, no factorial
        plain = plain[:-1].rstrip()
    return len(plain)


def _is_expression(content: str) -> bool:
    """Whether a run of mathematics can be an answer: it has a digit, a command or a variable that stands alone."""
    plain = content.strip(" *_`$")
    if not plain or not re.search(r"[\da-zA-Z½⅓⅔¼¾⅛⅜⅝⅞π∞]", plain):
        return False
    if re.fullmatch(r"\\[,;:! {}]*", plain):
        return False
    return re.match(r"[aAI](?:\s|$)", plain) is None or len(plain) > 2


def _leading_words(text: str) -> str | None:
    """A few words that may be an answer of words, as `Evelyn` or `even`."""
    plain = re.split(r"[.,;!?\n]|\bbecause\b|\bsince\b", re.sub(r"[*_`]|</?\w+>", "", text), maxsplit=1)[0].strip()
    plain = re.sub(r"^\$(.*)\$$", r"\1", plain).strip(" \"'$")
    return plain if re.search("[a-zA-Z]", plain) and len(plain.split()) <= MAX_PHRASE_WORDS else None


def last_expression(text: str) -> str | None:
    """The expression that ends last in a text: of mathematics in dollar signs, or a number with what belongs to it."""
    found: str | None = None
    at = end = 0
    text = re.sub(r"(?m)^\s*(?:[-*]|\d+[.)])\s+(?=[A-Za-z*$\\])|-+(?=-)", " ", text)
    while at < len(text):
        if (
            at
            and (
                text[at - 1].isalpha()
                or text[at - 1] == "#"
                or (text[at - 1] == "-" and at > 1 and text[at - 2].isalpha())
            )
        ) or text[at].isspace():
            at += 1
            continue
        read = None if _NOT.search(text, max(0, at - 8), at) else _last_item(text, at)
        if read is None:
            word = re.match(r"#?\w+", text[at:])  # digits of a word or of a label (#12) are no number
            at += word.end() if word else 1
        elif found is not None and _OR.fullmatch(text, end, at):
            found, at = f"{found}, {read[0]}", read[1]  # `5 or 6` is a hedge
            end = at
        else:
            found, at = read
            end = at
    return found


_NOT = re.compile(r"\bnot\s+$", re.I)
_OR = re.compile(r"[\s$]*,?\s*or\s+(?:maybe|perhaps|possibly|even)?[\s$]*", re.I)


def _last_item(text: str, at: int) -> tuple[str, int] | None:
    mathematics = _DOLLARS.match(text, at)
    if mathematics and not _PROSE.search(_ARGUMENT.sub("", mathematics.group())):
        content = next(group for group in mathematics.groups() if group is not None)
        return (content.strip(" .,;"), mathematics.end()) if re.search(r"\w", content) else None
    if not re.match(r"[-$€£]?\s?[-.\d]|\\(?:d?frac|sqrt|pi|binom|infty)|[½⅓⅔¼¾⅛⅜⅝⅞√π(]|[a-zA-Z]\s*=", text[at:]):
        return None
    end = _plain_end(text, at)
    content = text[at:end].strip()
    if not re.search(r"\d|\\[a-z]{2}|[½⅓⅔¼¾⅛⅜⅝⅞√π]", content):
        return None
    scale = _SCALE_WORD.match(text, end)
    return (content + (scale.group() if scale else ""), scale.end() if scale else end)
