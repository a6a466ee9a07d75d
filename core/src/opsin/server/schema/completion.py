"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from opsin.config import INT64_MAX, MAX_LOGPROBS
from opsin.server.schema.prompts import Prompts
from opsin.server.schema.sampling import SamplingRequest
from opsin.server.schema.strict import field_error


class CompletionRequest(SamplingRequest):
    """The body of ``POST /v1/completions``: plain prompts, no chat template."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingRequest.unsupported,
        "add_special_tokens": (True,),
        "suffix": ("",),
    }

    prompt: Prompts
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    echo: bool | None = None
    truncate_prompt_tokens: Annotated[int | None, Field(ge=-1, le=INT64_MAX)] = None

    @model_validator(mode="after")
    def _consistent_completion(self) -> CompletionRequest:
        if self.max_tokens == 0 and (not self.echo or self.stream):
            raise field_error("max_tokens", "max_tokens=0 needs echo=true and stream=false")
        if self.stream and self.echo and self.logprobs is not None:
            raise field_error("echo", "echo with logprobs is not available with stream=true")
        return self
