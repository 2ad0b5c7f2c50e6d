"""From a text to plain lines: LaTeX and other signs become the few that the lexer knows."""

from __future__ import annotations

import re

_FRACTION = re.compile(r"\\[cdt]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
_NESTED_FRACTIONS = 4
_CURRENCIES = {"€": "euros", "£": "pounds", "¥": "yen", "₹": "rupees"}
_PLAIN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        # `≈` is no claim that two numbers are equal, and neither is `= ~3`.
        (r"=[ ]?[~≈]|[~≈][ ]?=|(?<=[\s(])~(?=[ ]?[$\d.])|[≃≅≐]|\\(?:approx(?:eq)?|simeq|cong)(?![a-zA-Z])", " ≈ "),
        (r"\\(?:text|textbf|textit|textrm|emph|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r" \1 "),
        (r"([=+*/-] ?)\\f?box(?:ed)? ?\{([^{}]*)\}", r"\1 \2 "),
        (r"\\f?box(?:ed)? ?\{([^{}]*)\}", r" ; \1 ; "),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\\!|(?<!\d)\*\*|\*\*(?!\d)", ""),
        (r"\{,\}", ","),
        (r"\\(?:begin|end) ?\{\w+\*?\}", " ; "),
        (r"\\\\", "\n"),
        (r"\\[()\[\],;: ]|\$\$|[&~\u00a0\u202f]|\^ ?(?:\{ ?\\circ ?\}|\\circ)|°", " "),
        (r"\\([%$])", r"\1"),
        *((rf"(\d) ?{sign}(?! ?\.?\d)", rf"\1 {name} ") for sign, name in _CURRENCIES.items()),
        (r"(\d) ?¢", r"\1 cents "),
        (r"[€£¥₹]", "$"),
        (r"\\(?:times|cdot|ast)(?![a-zA-Z])|[×·⋅∗]", "*"),
        (r"\\div(?![a-zA-Z])|[÷∕⁄]", "/"),
        (r"[−–‒]", "-"),
        (r"\\[lc]?dots(?![a-zA-Z])|…", "..."),
        (r"\\(?:q?quad|implies|to|[lL]?(?:ong)?[rR]ightarrow)(?![a-zA-Z])", " ; "),
        (r"\b([ap])\.m\.", r"\1m"),
        (r"(\d) ?mph\b", r"\1 miles per hour"),
        (r"(\d) ?(?:kph|kmh|km/h)\b", r"\1 km per hour"),
        (r"(\d) ?\\[cdt]?frac ?\{(\d+)\} ?\{(\d+)\}", r"\1 \2/\3"),
        (r"\\[cdt]?frac ?(\d) ?(\d)", r"(\1/\2)"),
        (r"\n[ \t]{0,40}=", " ="),
    )
)


def plain_text(text: str) -> str:
    """A text with its LaTeX made plain, as far as that is simple."""
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    for _ in range(_NESTED_FRACTIONS):
        text, count = _FRACTION.subn(lambda found: f"({_bracketed(found[1])}/{_bracketed(found[2])})", text)
        if not count:
            break
    return text


def _bracketed(expression: str) -> str:
    return expression.strip() if re.fullmatch(r"\s*[\d.,]+\s*", expression) else f"({expression.strip()})"
