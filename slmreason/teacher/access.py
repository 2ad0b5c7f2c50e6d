"""Where an API is, and the key to it, which is shown nowhere."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from slmreason.runtime.redact import MIN_CHARS


def checked_url(base_url: str) -> str:
    """The address without a slash at its end.

    Raises:
        ValueError: it is no http address, or it holds a password, which would end up in every config.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"teacher.base_url: {base_url!r} is no address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("teacher.base_url: keys and passwords do not belong here; see api_key_env")
    return base_url.rstrip("/")


def is_loopback(base_url: str) -> bool:
    """True when an address is on this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(variable: str, base_url: str) -> str | None:
    """The key from the environment; None where there is none and the API is on this machine.

    Raises:
        ValueError: there is none, or it is no key; the message names the variable and never holds the key.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
        raise ValueError(
            "teacher.api_key_env: this is no name of an environment variable; the key does not belong here"
        )
    key = os.environ.get(variable, "").strip()
    if not key and not is_loopback(base_url):
        raise ValueError(f"teacher: the environment variable {variable} (api_key_env) has no key for {base_url}")
    if not re.fullmatch(r"[\w.~+/=:|@-]*", key, re.ASCII):  # what would be escaped in an error could not be found there
        raise ValueError(f"teacher: what the environment variable {variable} holds is no key")
    return key or None


def redaction(key: str | None, variable: str) -> Callable[[str], str]:
    """Puts the variable's name in the place of the key in an answer, and leaves the rest of it as it is."""
    if key is None or len(key) < MIN_CHARS:
        return lambda text: text
    return lambda text: text.replace(key, f"[{variable}]")
