"""The ``prompt`` and ``input`` fields: text or token ids, one or several."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_EXPECTED = (
    "expected a text, a list of texts, a list of token ids, or a list of such lists; none of them empty"
)


def _known_shape(value: Any) -> Any:
    """One clear error instead of one for each alternative of the union."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        is_text = all(isinstance(element, str) and element for element in value)
        is_lists = all(isinstance(element, list) and element and _are_ids(element) for element in value)
        if is_text or is_lists or _are_ids(value):
            return value
    raise ValueError(_EXPECTED)


def _are_ids(value: list[Any]) -> bool:
    return all(type(element) is int for element in value)


PlainPrompt = str | list[int]
"""A text, or token ids."""

_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[int], Field(min_length=1)]

Prompts = Annotated[
    _Text | Annotated[list[_Text], Field(min_length=1)] | _Ids | Annotated[list[_Ids], Field(min_length=1)],
    BeforeValidator(_known_shape),
]
