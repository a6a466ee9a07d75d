"""The bodies of ``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from opsin.server.schema.chat import ChatFields, Tool
from opsin.server.schema.strict import RequestBody


class TokenizeRequest(ChatFields):
    """The body of ``POST /tokenize``: ``prompt``, or ``messages`` as in a chat."""

    prompt: str | None = None
    model: Annotated[str | None, Field(max_length=1024)] = None
    add_special_tokens: bool | None = None
    """Of a ``prompt``: whether the tokenizer adds its own (a BOS); the default."""
    return_token_strs: bool | None = None
    tools: Annotated[list[Tool] | None, Field(max_length=256)] = None

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError('expected either "prompt" or "messages"')
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens is for a prompt; a chat template writes its own")
        return self


class DetokenizeRequest(RequestBody):
    """The body of ``POST /detokenize``."""

    tokens: Annotated[list[int], Field(max_length=1_000_000)]
    model: Annotated[str | None, Field(max_length=1024)] = None
