"""The fields that chat and completions share: how tokens are chosen, and what is told about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from opsin.fields import INT64_MAX, INT64_MIN
from opsin.params import MAX_LOGPROBS
from opsin.server.schema.strict import FIRST_FAULT, RequestBody, StrictModel, field_error


def _stop_strings(value: Any) -> Any:
    strings = [value] if isinstance(value, str) else value
    if strings is None or (isinstance(strings, list) and all(isinstance(s, str) and s for s in strings)):
        return strings
    raise ValueError("expected a non-empty string or a list of them")


_MAX_BIASES = 1024


def _biases(value: Any) -> Any:
    if value is None or isinstance(value, dict):
        if len(value or ()) > _MAX_BIASES:
            raise ValueError(f"at most {_MAX_BIASES} tokens are accepted")
        if all(key.isascii() and key.isdigit() and len(key) < 10 for key in value or ()):
            return value
        raise ValueError("the keys must be token ids")
    return value


_Stop = Annotated[str, Field(min_length=1)]


class StreamOptions(StrictModel):
    """Options of a streamed answer."""

    include_usage: bool = False
    """A last chunk with the usage of the whole request."""
    continuous_usage_stats: bool = False
    """The usage so far in every chunk."""
    include_obfuscation: bool = False
    """Accepted; chunks are never padded."""


class JsonSchemaFormat(StrictModel):
    """A named JSON schema."""

    name: Annotated[str, Field(max_length=256)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('"json_schema" belongs to type "json_schema", and that type needs it')
        return self


class StructuredOutputs(StrictModel):
    """A constraint on the answer; exactly one field is set."""

    # "json" under another name: pydantic has a method of that name.
    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Annotated[str | None, Field(max_length=10_000)] = None
    choice: Annotated[list[str] | None, Field(max_length=1000)] = None
    grammar: Annotated[str | None, Field(max_length=100_000)] = None
    json_object: bool | None = None


class SamplingRequest(RequestBody):
    """Fields of `ChatRequest` and `CompletionRequest`."""

    ignored: ClassVar[frozenset[str]] = RequestBody.ignored | {"spaces_between_special_tokens"}
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **RequestBody.unsupported,
        "guided_whitespace_pattern": (),
        "kv_transfer_params": (),
        "logits_processors": (),
        "prompt_embeds": (),
        "return_tokens_as_token_ids": (False,),
        "vllm_xargs": (),
    }

    model: Annotated[str | None, Field(max_length=1024)] = None
    max_tokens: Annotated[int | None, Field(ge=0, le=INT64_MAX)] = None
    min_tokens: Annotated[int | None, Field(ge=0, le=INT64_MAX)] = None
    n: Annotated[int | None, Field(ge=1, le=10_000)] = None
    best_of: Annotated[int | None, Field(ge=1, le=10_000)] = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float | None, Field(ge=-10, le=10)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=INT64_MAX)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=INT64_MIN, le=INT64_MAX)] = None
    stop: Annotated[_Stop | list[_Stop] | None, BeforeValidator(_stop_strings)] = None
    stop_token_ids: Annotated[list[int] | None, Field(max_length=1024)] = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None,
        Field(max_length=_MAX_BIASES),
        BeforeValidator(_biases),
    ] = None
    allowed_token_ids: Annotated[list[int] | None, FIRST_FAULT] = None
    bad_words: Annotated[list[_Stop] | None, Field(max_length=1024)] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Annotated[str | None, Field(max_length=10_000)] = None
    guided_choice: Annotated[list[str] | None, Field(max_length=1000)] = None
    guided_grammar: Annotated[str | None, Field(max_length=100_000)] = None
    mm_processor_kwargs: dict[str, Any] | None = None
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    priority: Annotated[int | None, Field(ge=INT64_MIN, le=INT64_MAX)] = None
    request_id: Annotated[str | None, Field(max_length=1024)] = None
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "stream_options needs stream=true")
        if self.stream and self.prompt_logprobs is not None:
            raise field_error("prompt_logprobs", "prompt_logprobs is not available with stream=true")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise field_error("best_of", "best_of must not be smaller than n")
        if self.stream and (self.use_beam_search or (self.best_of or 1) > (self.n or 1)):
            raise field_error(
                "stream", "use_beam_search and best_of choose among finished answers; set stream=false"
            )
        if self.length_penalty is not None and not self.use_beam_search:
            raise field_error("length_penalty", "length_penalty needs use_beam_search=true")
        return self
