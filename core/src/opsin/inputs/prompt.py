"""A prompt as it comes in: text or token ids, with media."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsin.errors import RequestError
from opsin.inputs.placeholders import GuardedText
from opsin.vllm_names import PROMPT, translated

PromptInput = str | Sequence[int] | Mapping[str, Any]
"""Text; token ids; or a dict with ``prompt`` or ``prompt_token_ids``, and the other `KEYS` as needed."""

KEYS = (
    "prompt",
    "prompt_token_ids",
    "multi_modal_data",
    "multi_modal_uuids",
    "mm_processor_kwargs",
    "cache_salt",
)
"""``multi_modal_uuids`` have no effect: media are known by their content."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt whose form has been checked, and nothing else.

    Attributes:
        text: as written; with ``token_ids`` set it is only carried along.
        guarded: the same text with what users wrote told apart; None: all of it is taken as written.
        token_ids: given instead of text.
        media: modality -> one item, several, or embeddings, as the user gave them.
        options: ``mm_processor_kwargs`` of the request.
        salt: keeps the prompt's cached prefix apart from that of other salts.
    """

    text: str | None = None
    guarded: GuardedText | None = None
    token_ids: Sequence[int] | None = None
    media: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    salt: str = ""

    @classmethod
    def parse(cls, prompt: PromptInput | Prompt) -> Prompt:
        """Check the form of a prompt.

        Raises:
            RequestError: it has another form, or unknown keys.
        """
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        elif not isinstance(prompt, Mapping):
            prompt = {"prompt_token_ids": prompt}
        prompt = translated("the prompt", prompt, PROMPT, KEYS, RequestError)
        text, ids = _of(str, "a string", prompt, "prompt"), prompt.get("prompt_token_ids")
        if text is None and ids is None:
            raise RequestError('the prompt has neither "prompt" nor "prompt_token_ids"; expected one of them')
        if ids is None and text == "":
            raise RequestError("the prompt is empty; expected text")
        return cls(
            text=text,
            token_ids=None if ids is None else _token_ids(ids),
            media=_of(Mapping, "a dict", prompt, "multi_modal_data") or {},
            options=_of(Mapping, "a dict", prompt, "mm_processor_kwargs") or {},
            salt=_of(str, "a string", prompt, "cache_salt") or "",
        )


def _of(kind: type[Any], expected: str, prompt: Mapping[str, Any], key: str) -> Any:
    value = prompt.get(key)
    if value is not None and not isinstance(value, kind):
        raise RequestError(f'"{key}" is a {type(value).__name__}; expected {expected}')
    return value


def _token_ids(ids: Any) -> list[int]:
    try:
        tokens = list(ids.tolist() if hasattr(ids, "tolist") else ids)
        if isinstance(ids, (bytes, bytearray)) or any(isinstance(token, bool) for token in tokens):
            raise TypeError
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise RequestError("expected a text, a list of token ids, or a dict as the prompt") from None
