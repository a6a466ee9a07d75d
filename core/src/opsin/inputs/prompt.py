"""The forms in which a prompt is given -> `ParsedPrompt`."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsin.errors import RequestError, require_known

KEYS = ("prompt", "prompt_token_ids", "multi_modal_data", "mm_processor_kwargs", "cache_salt")


@dataclass(frozen=True, kw_only=True)
class ParsedPrompt:
    """A prompt whose form has been checked, and nothing else.

    Attributes:
        text: as written; with ``token_ids`` set it is only carried along.
        token_ids: given instead of text.
        media: the user's ``multi_modal_data``.
        options: the user's ``mm_processor_kwargs``.
        salt: the user's ``cache_salt``.
    """

    text: str | None = None
    token_ids: Sequence[int] | None = None
    media: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    salt: str = ""


def parse_prompt(prompt: Any) -> ParsedPrompt:
    """Check the form of a prompt: text, token ids, or a dict with the keys in `KEYS`.

    Raises:
        RequestError: it has another form, or unknown keys.
    """
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    elif not isinstance(prompt, Mapping):
        prompt = {"prompt_token_ids": prompt}
    require_known("the prompt", prompt, KEYS, RequestError)
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and ids is None:
        raise RequestError('the prompt has neither "prompt" nor "prompt_token_ids"; expected one of them')
    if ids is None and text == "":
        raise RequestError("the prompt is empty; expected text")
    if not isinstance(text, str | None):
        raise RequestError(f'"prompt" is a {type(text).__name__}; expected a string')
    salt = prompt.get("cache_salt") or ""
    if not isinstance(salt, str):
        raise RequestError(f'"cache_salt" is a {type(salt).__name__}; expected a string')
    return ParsedPrompt(
        text=text,
        token_ids=None if ids is None else _token_ids(ids),
        media=_mapping(prompt, "multi_modal_data"),
        options=_mapping(prompt, "mm_processor_kwargs"),
        salt=salt,
    )


def _mapping(prompt: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = prompt.get(key)
    if not isinstance(value, Mapping | None):
        raise RequestError(f'"{key}" is a {type(value).__name__}; expected a dict')
    return value or {}


def _token_ids(ids: Any) -> list[int]:
    try:
        return [operator.index(token) for token in ids]
    except TypeError:
        raise RequestError("expected a text, a list of token ids, or a dict as the prompt") from None
