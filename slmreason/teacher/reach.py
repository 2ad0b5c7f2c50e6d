"""Whether an API can be asked at all: its list of models tells, which costs nothing, else one short question does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmreason.teacher.patience import Hopeless, Refused, Unreachable, failure_of
from slmreason.teacher.prompted import Failure

QUESTION = [{"role": "user", "content": "Answer with the word OK."}]
WAIT_S = 30.0
"""So long the answer to it is waited for, at most."""
TRIES = 2
"""After the first one, at most."""
TO_CHECK: dict[type[Failure], str] = {
    Unreachable: "; check teacher.base_url",
    Refused: "; check teacher.temperature, teacher.max_completion_tokens and teacher.extra_body",
    Hopeless: "",
}
"""Failures after which no other question would fare better, and what of a config they point at; Hopeless says it."""


def first_failure(
    client: Any, listing: Any, model: str, parameters: Mapping[str, Any], timeout_s: float
) -> Failure | None:
    """Why a model of an API cannot be asked; None where the API lists it, or answers a question.

    Args:
        client: of the library openai, with which the question is asked.
        listing: the same, with which the list of models is.
        parameters: of every question.
        timeout_s: of both clients.
    """
    import openai

    try:
        if any(each.id == model for each in listing.models.list().data):
            return None
    except (openai.APIConnectionError, openai.AuthenticationError) as error:
        if not isinstance(error, openai.APITimeoutError):
            return failure_of(error, heard=False, timeout_s=timeout_s)
    except Exception:  # noqa: S110 - some have no such list, or one of another form, which tells nothing
        pass
    try:
        client.chat.completions.create(model=model, messages=QUESTION, extra_body=dict(parameters))
    except openai.OpenAIError as error:
        return failure_of(error, heard=False, timeout_s=timeout_s)
    return None
