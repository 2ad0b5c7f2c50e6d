"""Answers of a teacher on disk: each is there before it is used, and none is asked for twice."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmreason.teacher.prompted import Answer

log = logging.getLogger(__name__)


class AnswerFile:
    """Answers by the request they answer, as JSONL. Appended to and synced one at a time; any thread may."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._kept: dict[str, Answer] | None = None
        self._output_tokens: list[int] = []

    def get(self, key: str) -> Answer | None:
        with self._lock:
            return self._read().get(key)

    def prepare(self) -> None:
        """Makes the file if it is not there, and ends its last line, which a crash may have torn.

        Where it cannot be written, that is an error before anything is paid for.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            file.seek(max(0, file.tell() - 1))
            if file.read() not in (b"", b"\n"):
                file.write(b"\n")

    def put(self, key: str, answer: Answer, facts: Mapping[str, Any]) -> None:
        """Adds an answer, after `prepare`; it is on the disk when this returns."""
        row = {"key": key, "text": answer.text, "truncated": answer.truncated, **facts}
        if answer.refusal is not None:
            row["refusal"] = answer.refusal
        with self._lock:
            kept = self._read()
            # Without a buffer a line is one write, which another run with the same file cannot get into.
            with open(self.path, "ab", buffering=0) as file:
                file.write(json.dumps(row).encode() + b"\n")
                os.fsync(file.fileno())
            kept[key] = answer
            self._output_tokens.append(int(row.get("output_tokens", 0)))

    def mean_tokens(self) -> int | None:
        """Tokens of an answer on average; None where there is no answer yet."""
        with self._lock:
            self._read()
            return round(sum(self._output_tokens) / len(self._output_tokens)) if self._output_tokens else None

    def _read(self) -> dict[str, Answer]:
        """Reads the file when it is first needed: only one of several processes asks."""
        if self._kept is not None:
            return self._kept
        self._kept, broken = {}, 0
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                row = json.loads(line)
                answer = Answer(row["text"], row["truncated"], row.get("refusal"))
                key, tokens = row["key"], int(row["output_tokens"])
            except (ValueError, LookupError, TypeError):
                broken += bool(line.strip())
                continue
            self._kept.setdefault(key, answer)
            self._output_tokens.append(tokens)
        if broken:
            log.warning("%s: %d lines cannot be read; their answers are asked for again", self.path, broken)
        return self._kept
