r"""One way to write what can be written in many: characters, TeX commands, formatting and spacing of an answer.

Nothing here decides whether two answers are equal. `as_seen` makes characters what a reader sees, `tidy` makes an
answer plain TeX, and `same_text` compares two of them as texts. Every pattern takes time in proportion to the text.
"""

from __future__ import annotations

import re
import unicodedata

_AS_SEEN = {
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63"), "-"),
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width
    **dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2009\u200a\u202f"), " "),
    # Zero width and direction marks.
    **dict.fromkeys([0xAD, 0x61C, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF]),
}
_MATHEMATICAL = {
    "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/",
    "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∼": r"\approx ",
    "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}",
    "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ",
    "μ": r"\mu ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ", "Ω": r"\Omega ", "Δ": r"\Delta ",
    "º": "°", "…": r"\ldots ",
}  # fmt: skip
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ", "0123456789+-()nx", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_VULGAR = re.compile("[¼½¾⅐-⅞↉]")
_OVERLINED = re.compile(r"(?:\d[\u0304\u0305])+")
_ROOT = re.compile(r"([√∛])\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-zA-Z]))")

_BRACE = re.compile(r"\\(?:f?box|boxed|framebox)\s*\{|[{}]")
_BARE_BOX = re.compile(r"\\boxed\s*(?=[^\s{])(-?[\d.,/]*\d%?|\\[a-zA-Z]+(?:\s*(?:\{[^{}]*\}|\d))*|[A-Za-z])")
_SCALE_BEHIND = re.compile(
    r"\}?[\s$]*(?:\\text\s*\{\s*)?(\\?%|(?:hundred|thousand|million|billion|trillion|dozen)\b)", re.IGNORECASE
)
_EMPHASIS = re.compile(r"(?<![\w)}\]*])(\*\*|__)(?=\S)([^*_\n]+?)(?<=\S)\1(?![\w({])")
_TAG = re.compile(r"</?(?:answer|final_answer|b|i|u|p|em|strong|code|br|span|sub|sup)\s*/?>", re.IGNORECASE)
_DELIMITER = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_SPACING = re.compile(r"(?<!\\)\\[,;:!> ]|\\q?quad(?![a-zA-Z])|(?<!\\)~|\\(?:thin|med|thick)space(?![a-zA-Z])")
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it|tt|sf|big+[lrm]?|Big+[lrm]?|left(?![a-z])\.?"
    r"|right(?![a-z])\.?|mathstrut|strut|hfill)(?![a-zA-Z])"
)
_FACE = re.compile(
    r"\\(?:textbf|textit|textsf|texttt|emph|underline|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|pmb)\s*(?=\{)"
)
_TEXT = re.compile(r"\\(?:textrm|textnormal|mathrm|mathop|mbox|hbox|operatorname\*?|text)\s*(?=\{)")
_ARGUMENTS = re.compile(r"\\(?:[dtc]?(frac|binom)|(sqrt|overline|bar|dot))(?![a-zA-Z])\s*")
_TOKEN = re.compile(r"\s*(\\[a-zA-Z]+(?:\s*\{[^{}]*\})?|[^\s\\{}^_$&])")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,3})(?![\w.])")
_CALL = re.compile(r"(?<![\\a-zA-Z])(sqrt|pi|infinity|inf|sin|cos|tan|log|ln|exp)(?![a-zA-Z])")
_PERCENT_WORD = re.compile(
    r"\s*(?:\\text\s*\{\s*(?:percent|per cent|percentage|pct|\\?%)\s*\}|\b(?:percent|per cent|pct)\b)\.?", re.I
)
_TEXT_NUMBER = re.compile(r"\\text\s*\{\s*(-?[\d.,]+\s*(?:\\?%)?)\s*\}")
_NEGATED = re.compile(r"\\not\s*(=|\\in(?![a-z])|<|>)")


def as_seen(text: str) -> str:
    """Digits of any script, full-width letters, dashes for a minus and invisible characters as a reader sees them."""
    return text if text.isascii() else text.translate(_AS_SEEN)


def mathematics(text: str) -> str:
    r"""Mathematical characters as TeX: `½`, `√2`, `x²`, `10³`, `π`, `≥`, `3̅`."""
    if text.isascii():
        return text
    text = _OVERLINED.sub(lambda found: rf"\overline{{{found.group()[::2]}}}", text)
    text = _VULGAR.sub(lambda found: _vulgar(found.group()), text)
    text = _RAISED.sub(lambda found: "^{" + "".join(_SUPERSCRIPTS[c] for c in found.group()) + "}", text)
    text = _LOWERED.sub(lambda found: "_{" + "".join(_SUBSCRIPTS[c] for c in found.group()) + "}", text)
    text = _ROOT.sub(lambda found: rf"\sqrt{'[3]' if found[1] == '∛' else ''}{{{found[2] or found[3]}}}", text)
    return "".join(_MATHEMATICAL.get(character, character) for character in text)


def _vulgar(character: str) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", character).partition("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}` whose braces close, else None; `\boxed 3` holds a 3.

    Boxes with nothing between them but `and`, `or`, commas and dollar signs hold one answer: `3, 4`.
    """
    found = last_box(text)
    return None if found is None else found[0]


def last_box(text: str) -> tuple[str, int] | None:
    """(content, position) of what `last_boxed` gives."""
    if "box" not in text:
        return None
    boxes = [*_boxes(text), *((found.start(), found.start(1), found.end()) for found in _BARE_BOX.finditer(text))]
    boxes = sorted(box for box in boxes if text[box[1] : box[2]].strip())  # an empty one holds no answer
    if not boxes:
        return None
    outer, start, end = boxes[-1]
    contents = [_in_context(text, outer, start, end)]
    for before, inner, closed in reversed(boxes[:-1]):
        if closed >= outer or not _JOINT.fullmatch(text, closed + 1, outer):
            break
        contents.insert(0, _in_context(text, before, inner, closed))
        outer = before
    return ", ".join(dict.fromkeys(contents)), start


def _in_context(text: str, outer: int, start: int, end: int) -> str:
    r"""What a box holds, with the sign before it (`= -\boxed{3}`) and the scale word behind it (`9` million)."""
    content = text[start:end]
    before = text[max(0, outer - 8) : outer].rstrip("\\ \n")
    if before.endswith("-") and re.search(r"(?:^|[=:$({\s])\s*-$", before):
        content = f"-{content}" if re.match(r"\s*[\d\\.a-zA-Z]", content) else content
    scale = _SCALE_BEHIND.match(text, end)
    return f"{content} {scale.group(1)}" if scale else content


_JOINT = re.compile(r"(?:\s|\$|\\[()\[\]]|,|;|\.?\\text\s*\{\s*(?:and|or)\s*\}|\band\b|\bor\b|\\q?quad)*")


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(start of the command, start of the content, its end) of each box that closes and holds no other, in order.

    The last two are those of the innermost box, so that a box within a box is read once.
    """
    found: list[tuple[int, int, int]] = []
    opened: list[tuple[int, int]] = []
    for brace in _BRACE.finditer(text):
        if brace.group() != "}":
            opened.append((brace.start(), brace.end() if len(brace.group()) > 1 else -1))
        elif opened:
            start, content = opened.pop()
            holds_a_box = bool(found) and found[-1][0] > start
            if content >= 0 and not holds_a_box:
                found.append((start, content, brace.start()))
    return found


def tidy(answer: str) -> str:
    r"""An answer as plain TeX: without box, delimiters, markdown, tags, faces, spacing and last full stop.

    Commands take their arguments in braces (`\frac12` is `\frac{1}{2}`), text stands in `\text{}`, `4e3` is
    `4 \times 10^{3}`, and a function's name is a command.
    """
    plain = as_seen(answer)
    plain = mathematics(last_boxed(plain) or plain)
    plain = _TAG.sub(" ", re.sub(r"(?<=\d)\.\.\.", r"\\ldots", plain))
    plain = _EMPHASIS.sub(r"\2", plain).strip("`*# \n\t")
    plain = re.sub(r"(?<=\d)(?:,\s*\\!|\{,\}|\\,|,\\ )\s*(?=\d{3}(?!\d))", "", plain)
    plain = _TEXT.sub(r"\\text", _DELIMITER.sub("", plain))
    plain = _without_faces(_STYLE.sub("", _SPACING.sub(" ", plain)))
    plain = plain.replace(r"\leq", r"\le").replace(r"\geq", r"\ge").replace(r"\neq", r"\ne")
    plain = re.sub(r"\\le(?=slant)", r"\\le", plain).replace("slant", "") if "slant" in plain else plain
    plain = _NEGATED.sub(lambda found: r"\ne " if found[1] == "=" else r"\not" + found[1], plain)
    plain = (
        plain.replace("<=", r"\le ")
        .replace(">=", r"\ge ")
        .replace("!=", r"\ne ")
        .replace(r"\lt", "<")
        .replace(r"\gt", ">")
    )
    # Programming languages write 1./3; TeX writes 0.\overline{3}.
    plain = re.sub(r"(?<=\d)\.(?=[\s/*+)-])", "", " ".join(plain.split()).strip(" ,;:").rstrip(" .\\"))
    plain = _PERCENT_WORD.sub(r"\\%", _TEXT_NUMBER.sub(r"\1", plain))
    plain = _CALL.sub(lambda found: "\\infty" if found[1].startswith("inf") else "\\" + found[1], plain)
    plain = _with_braces(plain.replace("**", "^"))
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", plain)


def _without_faces(text: str) -> str:
    r"""`\textbf{8}` as `8`: what the command is put on stays, with its braces where they are needed."""
    text = _FACE.sub("", text)
    return re.sub(r"(?<![\\\w}\]^_])\{([\w.,\s-]+)\}(?!\s*\{)", r"\1", text) if "{" in text else text


def _with_braces(text: str) -> str:
    r"""`\frac12`, `\frac3{5}`, `\binom52`, `\sqrt2`, `\sqrt(x)` and `x^(2)` with each argument in braces."""
    parts: list[str] = []
    at = 0
    for found in _ARGUMENTS.finditer(text):
        if found.start() < at:
            continue
        name = found.group(1) or found.group(2)
        parts += [text[at : found.start()], "\\", name]
        at = found.end()
        if name == "sqrt" and text[at : at + 1] == "[" and "]" in text[at:]:
            behind = text.index("]", at) + 1
            parts.append(text[at:behind])
            at = behind
        if name == "sqrt" and text[at : at + 1] == "(" and (end := _closing(text, at)):
            parts.append("{" + text[at + 1 : end] + "}")
            at = end + 1
            continue
        for _ in range(2 if found.group(1) else 1):
            token = None if re.match(r"\s*\{", text[at:]) else _TOKEN.match(text, at)
            if token:
                parts.append("{" + token.group(1) + "}")
                at = token.end()
            elif found.group(1) and (start := text.find("{", at)) >= 0 and (end := _closing(text, start)):
                inner = text[start + 1 : end]
                parts.append("{" + (_with_braces(inner) if "\\" in inner else inner) + "}")
                at = end + 1
    parts.append(text[at:])
    plain = "".join(parts)
    return re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", plain)


def _closing(text: str, start: int) -> int | None:
    """Where the bracket that opens at `start` closes; None when it does not."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "({") - (text[at] in ")}")
        if depth == 0:
            return at
    return None


def same_text(answer: str, gold: str) -> bool:
    """True when two tidied answers differ only in what TeX does not print, or in the case of their words."""
    mine, theirs = squeeze(answer), squeeze(gold)
    return mine == theirs or (is_words(gold) and _words(answer) == _words(gold))


def squeeze(answer: str) -> str:
    """Two texts that differ only in what TeX does not print are the same text; a space between digits it prints."""
    plain = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)
    plain = re.sub(r"(?<!text)\{(\w)\}", r"\1", plain)
    return plain[2:-2] if plain.startswith("\\{") and plain.endswith("\\}") else plain


_WORDS = re.compile(r"(?:\\text\s*\{[^{}\d\\]*[a-zA-Z]{2}[^{}\d\\]*\}|[a-zA-Z][a-zA-Z'-]+(?:\s+[a-zA-Z'-]+)*)")


def is_words(answer: str) -> bool:
    r"""True for an answer of words, as `\text{Evelyn}` or `even`: no number, no command, no single letter."""
    return _WORDS.fullmatch(answer) is not None


def _words(answer: str) -> str:
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer)
    return " ".join(plain.lower().strip(" .'\"").split())
