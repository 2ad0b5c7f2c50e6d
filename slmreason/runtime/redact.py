"""What may be shown: text without secrets, and without characters that drive a terminal.

Whatever reaches the screen passes here, however it got into a message: the log (`SafeFormatter`), errors in the
arguments (`config.fail`), tracebacks and warnings (`guard`).
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from unicodedata import category
from urllib.parse import quote

from rich.markup import escape

MIN_CHARS = 8
"""A shorter value is a word like EMPTY for a server that wants no key, and may well occur in a text."""
_VARIABLE = re.compile(r"(?:(?:.*_)?(?:API_?KEY|KEY|TOKEN|SECRET)|.*PASSW(?:OR)?D)(?:_?\d+)?", re.IGNORECASE)
"""Names of environment variables that hold a secret: OPENAI_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, PGPASSWORD."""
_OPTION = re.compile(
    r"(?:.*_)?(?:api_?key|access_?key|secret(?:_key)?|private_key|passw(?:or)?d)|(?:(?:api|auth|access|hf)_?)?token",
    re.IGNORECASE,
)
"""Names of options that hold one. Not those of a tokenizer, such as eos_token."""
_PATTERNS = (
    (re.compile(r"(?<=://)[^\s/?#\"'<>]+@"), "***@"),
    (re.compile(r"([?&][\w.-]{0,40}(?:key|token|secret|passw|signature|credential)[\w.-]{0,40}=)[^&#\s\"'<>]+", re.I),
     r"\1***"),
    (re.compile(r"((?:api[-_]?key|access[-_]?key|secret[-_]?key|(?:access|auth|api)[-_]?token|password|passwd)[\"']?"
                r"\s?[:=]\s?[\"']?)(?![\[*]|null\b|none\b)[^\s\"',;&}\])]{4,}", re.I), r"\1***"),
    (re.compile(r"(authorization[\"']?\s?[:=]\s?[\"']?(?:basic|token)\s)[^\s\"',]+", re.I), r"\1***"),
    (re.compile(r"(\bbearer\s)(?=[^\d\s*]{0,80}[\d*]|\S{24})[\w.~+/=*-]{8,}", re.I), r"\1***"),
    # A provider's mark, a long piece with a digit, or stars, as servers quote keys: sk-learn-model-2 is a name.
    (re.compile(r"\bsk-(?=(?:proj|svcacct|admin|ant|or)-|[\w-]{0,99}(?:\*|(?=[A-Za-z_]{0,40}\d)\w{16}))"
                r"(?=[\w-]{0,99}[\d*])[\w*-]{8,}"), "***"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|gh[opsru]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|xox[abp]-[\w-]{10,}"
                r"|AIza[\w-]{30,}|AKIA[0-9A-Z]{16}\b|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,})"), "***"),
)  # fmt: skip
"""Passwords in addresses, keys in queries and headers, and keys by their shape."""
_HIDDEN: dict[str, str] = {}
"""Secrets that `hide` was told of, and what each is called."""


def hide(secret: str, name: str) -> None:
    """Makes `redact` put `[name]` in the place of a secret that no environment variable's name gives away."""
    if len(secret) >= MIN_CHARS:
        _HIDDEN[secret] = name


def redact(text: str) -> str:
    """The text without secrets: values of environment variables for keys, passwords in addresses, known shapes."""
    for secret, name in sorted(_secrets(), key=lambda pair: -len(pair[0])):
        for written in (secret, repr(secret)[1:-1], quote(secret, safe="")):
            text = text.replace(written, f"[{name}]")
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def _secrets() -> Iterator[tuple[str, str]]:
    yield from _HIDDEN.items()
    for name, value in os.environ.items():
        # Some variables name the file that a key is in.
        if _VARIABLE.fullmatch(name) and len(value.strip()) >= MIN_CHARS and not os.path.exists(value):
            yield value.strip(), name


def is_secret(option: str, value: object) -> bool:
    """True for an option that by its name, or by what it was given, holds a key, a token or a password."""
    return isinstance(value, str) and bool(value) and (bool(_OPTION.fullmatch(option)) or redact(value) != value)


def printable(text: str) -> str:
    """The text with control characters replaced, direction marks among them, so that it cannot drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else "\ufffd" for c in text)


def shown(text: str) -> str:
    """The text as it may be printed: without secrets and without control characters."""
    return printable(redact(text))


def cell(text: str) -> str:
    """The text as it may stand in a table or a title of rich, which would take [red] for a colour."""
    return escape(shown(text))


class SafeFormatter(logging.Formatter):
    """Formats a record, its arguments and its traceback, into what may be printed."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def guard() -> None:
    """From here on, what Python prints by itself of errors and warnings in this process is what may be printed."""
    plain = warnings.formatwarning
    sys.excepthook = _print_error
    threading.excepthook = lambda args: _print_error(args.exc_type, args.exc_value, args.exc_traceback)
    warnings.formatwarning = lambda *args, **options: shown(plain(*args, **options))


def _print_error(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    print(shown("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
