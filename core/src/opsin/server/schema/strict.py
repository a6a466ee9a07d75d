"""What all request bodies have in common: strict types, and an error for every field that has no effect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_FAULTS = 5
"""Most faults of one kind that an answer lists. Looking for more is work that a client could ask for."""

FIRST_FAULT = Field(fail_fast=True)
"""Marks a list that may be long: its first fault ends the check, so that its faults are never counted."""


def field_error(name: str, text: str) -> PydanticCustomError:
    """An error of one field, raised where pydantic does not know which. The text names it as well."""
    return PydanticCustomError("field", "{text}", {"text": text, "param": plain(name)})


def content_kind(value: Any) -> str:
    """The tag of a message's content: a text, or a list of parts."""
    return "as_text" if isinstance(value, str) else "as_parts"


def plain(name: str) -> str:
    """A client's name, shortened and without characters that could have a meaning elsewhere."""
    return re.sub(r"[^\w-]", "?", name[:40], flags=re.ASCII)


class StrictModel(BaseModel):
    """No type is guessed, nothing is NaN, no field is unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_unknown_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            cls._check_few_unknown(data)
        return data

    @classmethod
    def _check_few_unknown(cls, data: Mapping[str, Any]) -> None:
        """More than `MAX_FAULTS` unknown fields are one fault: pydantic would make a fault of each."""
        known = cls.known_fields()
        unknown = [name for name in data if name not in known] if len(data) > MAX_FAULTS else []
        more = len(unknown) - MAX_FAULTS
        if more > 0:
            listed = ", ".join(plain(name) for name in unknown[:MAX_FAULTS])
            raise field_error(unknown[0], f"unknown fields: {listed}; and {more} more")

    @classmethod
    @cache
    def known_fields(cls) -> frozenset[str]:
        """Names and aliases of the fields."""
        fields = cls.model_fields
        return frozenset(fields) | {field.alias for field in fields.values() if field.alias is not None}


class RequestBody(StrictModel):
    """The body of a request.

    Unknown fields are refused, with the name that was probably meant: a misspelt setting that is silently
    passed over is worse than an error. Fields that other servers know fall into two groups. Those without
    any effect on the answer (``ignored``) are accepted. Those with one (``unsupported``) are refused unless
    they hold a value that asks for nothing.
    """

    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "guided_decoding_backend",
            "metadata",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "user",
        }
    )
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"store": (False,)}
    """Field -> values that ask for nothing; null is always one."""

    @classmethod
    @cache
    def known_fields(cls) -> frozenset[str]:
        """With those of other servers, even where they are refused."""
        return super().known_fields() | cls.ignored | cls.unsupported.keys()

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        cls._check_few_unknown(data)  # before names are compared: this runs before the base's validator
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.unsupported:
                harmless = cls.unsupported[name]
                # Not `in`: True equals 1.
                if value is not None and not any(type(value) is type(h) and value == h for h in harmless):
                    raise field_error(name, f"{name} is not supported by this server")
            elif name not in cls.ignored:
                close = get_close_matches(name[:64], cls.model_fields, n=1)
                if close:
                    raise field_error(name, f"unknown field {plain(name)!r}; did you mean {close[0]!r}?")
                kept[name] = value  # refused by the model, by name
        return kept
