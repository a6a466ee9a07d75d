"""What the server answers with. The JSON omits fields that were never set and keeps nulls."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens, those that pictures expand to included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class FunctionCall(BaseModel):
    """A function and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call the model asks for."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(BaseModel):
    """The answer."""

    role: str
    content: str | None
    tool_calls: list[ToolCall] = []


class ChatChoice(BaseModel):
    """One sample."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class _Answer(BaseModel):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str | None = None


class ChatCompletion(_Answer):
    """Answer of ``/v1/chat/completions``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None
    prompt_token_ids: list[int] | None = None


class FunctionCallDelta(BaseModel):
    """A piece of a call: the name once, then the arguments as they come."""

    name: str = ""
    arguments: str


class ToolCallDelta(BaseModel):
    """A piece of the call number ``index``."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCallDelta


class ChatDelta(BaseModel):
    """What is new."""

    role: str = ""
    content: str = ""
    tool_calls: list[ToolCallDelta] = []


class ChatChunkChoice(BaseModel):
    """What is new of one sample."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(_Answer):
    """An event of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens; None where nothing predicts a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One sample, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(_Answer):
    """Answer of ``/v1/completions``, and event of a streamed one."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Embedding(BaseModel):
    """One vector: numbers, or float32 (little-endian) in base64."""

    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingList(_Answer):
    """Answer of ``/v1/embeddings``."""

    object: Literal["list"]
    data: list[Embedding]
    usage: Usage


class Score(BaseModel):
    """How similar two texts are: from -1 to 1."""

    index: int
    object: Literal["score"]
    score: float


class ScoreList(_Answer):
    """Answer of ``/v1/score``."""

    object: Literal["list"]
    data: list[Score]
    usage: Usage


class RerankedDocument(BaseModel):
    """A document's text."""

    text: str


class RankedDocument(BaseModel):
    """A document's place in the request, and its score."""

    index: int
    relevance_score: float
    document: RerankedDocument | None = None


class Ranking(_Answer):
    """Answer of ``/v1/rerank``."""

    object: Literal["list"]
    results: list[RankedDocument]
    usage: Usage


class Pooled(BaseModel):
    """One vector."""

    index: int
    object: Literal["pooling"]
    data: list[float]


class PooledList(_Answer):
    """Answer of ``/pooling``."""

    object: Literal["list"]
    data: list[Pooled]
    usage: Usage


class Load(BaseModel):
    """Answer of ``/load``."""

    server_load: int


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    task: str
    modalities: list[str]


class ModelList(BaseModel):
    """Answer of ``/v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """Answer of ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    """Answer of ``/detokenize``."""

    prompt: str


class Version(BaseModel):
    """Answer of ``/version``."""

    version: str


class Status(BaseModel):
    """Answer of ``/health`` and ``/ready``."""

    status: str
