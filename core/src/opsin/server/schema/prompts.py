"""Bodies of the requests that take plain prompts: completions, embeddings, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from opsin.fields import INT64_MAX
from opsin.params import MAX_LOGPROBS
from opsin.server.schema.chat import ChatFields, Tool
from opsin.server.schema.sampling import SamplingRequest
from opsin.server.schema.strict import FIRST_FAULT, RequestBody, field_error

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
"""Text or token ids, one or several."""


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
        return self


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


_Several = _Text | Annotated[list[_Text], FIRST_FAULT, Field(min_length=1)]
_Model = Annotated[str | None, Field(max_length=1024)]
_Truncate = Annotated[int | None, Field(ge=-1, le=INT64_MAX)]


class ScoreRequest(RequestBody):
    """The body of ``POST /v1/score``: texts under the older names of vLLM, or its newer ones."""

    model: _Model = None
    text_1: _Several | None = None
    text_2: _Several | None = None
    queries: _Several | None = None
    documents: _Several | None = None
    truncate_prompt_tokens: _Truncate = None

    @model_validator(mode="after")
    def _one_source(self) -> ScoreRequest:
        older, newer = (self.text_1, self.text_2), (self.queries, self.documents)
        if sorted(None not in pair for pair in (older, newer)) != [False, True] or (
            any(older) and any(newer)
        ):
            raise ValueError("expected either text_1 and text_2, or queries and documents")
        return self

    @property
    def firsts(self) -> list[str]:
        """The first texts."""
        return _listed(self.text_1 or self.queries or "")

    @property
    def seconds(self) -> list[str]:
        """The second ones."""
        return _listed(self.text_2 or self.documents or "")


class Document(RequestBody):
    """A document as an object."""

    text: _Text


class RerankRequest(RequestBody):
    """The body of ``POST /v1/rerank``, as Jina's and Cohere's."""

    query: _Text
    documents: Annotated[list[_Text | Document], FIRST_FAULT, Field(min_length=1)]
    model: _Model = None
    top_n: Annotated[int | None, Field(ge=1, le=INT64_MAX)] = None
    return_documents: bool | None = None
    truncate_prompt_tokens: _Truncate = None

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class PoolingRequest(RequestBody):
    """The body of ``POST /pooling``."""

    input: Prompts
    model: _Model = None
    encoding_format: Literal["float"] | None = None
    truncate_prompt_tokens: _Truncate = None


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


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

    tokens: Annotated[list[int], FIRST_FAULT, Field(max_length=1_000_000)]
    model: Annotated[str | None, Field(max_length=1024)] = None
