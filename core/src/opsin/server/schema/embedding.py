"""The body of ``POST /v1/embeddings``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from opsin.config import INT64_MAX
from opsin.server.schema.chat import ChatFields
from opsin.server.schema.prompts import Prompts


class EmbeddingRequest(ChatFields):
    """The body of ``POST /v1/embeddings``: ``input``, or ``messages`` for pictures."""

    input: Prompts | None = None
    model: Annotated[str | None, Field(max_length=1024)] = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1, le=INT64_MAX)] = None
    truncate_prompt_tokens: Annotated[int | None, Field(ge=-1, le=INT64_MAX)] = None
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=1024)] = None

    @model_validator(mode="after")
    def _one_source(self) -> EmbeddingRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError('expected either "input" or "messages"')
        return self
