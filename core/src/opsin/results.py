"""What a user gets: answers, embeddings, beams, and the engine's counters. Names are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from opsin.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's place in the raw distribution.

    Attributes:
        logprob: natural logarithm of its probability.
        rank: 1 for the most probable token.
        decoded_token: its text, as it reads after other text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """Sample number ``index`` of a request, as far as it is generated.

    Attributes:
        text: what was generated; while it grows, without what may become part of a stop string.
        token_ids: generated ids, the one that ended it included.
        cumulative_logprob: sum over the tokens; None unless ``logprobs`` was asked for.
        logprobs: for each token the chosen and the best ones: token id -> `Logprob`.
        finish_reason: None while it grows.
        stop_reason: the stop string or stop token id that ended it; None for the model's own end.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether it grows no more."""
        return self.finish_reason is not None

    def since(self, earlier: CompletionOutput) -> CompletionOutput:
        """The same with only the text, tokens and log-probabilities that are new."""
        return replace(
            self,
            text=self.text[len(earlier.text) :],
            token_ids=self.token_ids[len(earlier.token_ids) :],
            logprobs=self.logprobs and self.logprobs[len(earlier.logprobs or ()) :],
        )


class FailedOutputs(list[CompletionOutput]):
    """The outputs of a request that failed before it had any: to look for one raises the reason."""

    def __init__(self, error: RequestError) -> None:
        super().__init__()
        self.error = error

    def __getitem__(self, index: Any) -> NoReturn:
        raise self.error


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened, in seconds of `time.monotonic`, and what was saved.

    Attributes:
        arrival_time: the request came in.
        first_scheduled_time: its first tokens were computed.
        first_token_time: its first token was there.
        finished_time: its last sample ended.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        num_preemptions: how often one of its samples was preempted, to be computed again.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A snapshot of a request, as far as it is computed.

    Attributes:
        prompt: the text the user wrote, if it was text.
        prompt_token_ids: after expansion of media.
        prompt_logprobs: None first (nothing predicts the first token), then as in `CompletionOutput`.
        outputs: one per sample. Of a request that failed before it began there is none, and ``outputs[0]``
            raises ``error``.
        finished: whether all samples have ended.
        error: why the request failed, or None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    error: RequestError | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache."""
        return self.metrics.num_cached_tokens if self.metrics else 0

    def since(self, earlier: RequestOutput | None) -> RequestOutput:
        """The same with only what is new in its outputs."""
        if earlier is None:
            return self
        outputs = [now.since(before) for now, before in zip(self.outputs, earlier.outputs)]
        return replace(self, outputs=outputs)


@dataclass(frozen=True)
class EmbeddingOutput:
    """One embedding, ``data``: float32 (H,), or (dimensions,)."""

    data: Tensor

    @property
    def embedding(self) -> list[float]:
        """``data`` as a list."""
        return [float(value) for value in self.data.tolist()]


@dataclass(frozen=True)
class PoolingRequestOutput:
    """The answer to an embedding request.

    Attributes:
        prompt: the text the user wrote, if it was text.
        prompt_token_ids: after expansion of media.
        outputs: the embedding; None if the request failed or was aborted.
        finished: whether it has ended; always true once it is returned.
        error: why the request failed, or None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: EmbeddingOutput | None
    finished: bool
    metrics: RequestMetrics
    error: RequestError | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache."""
        return self.metrics.num_cached_tokens


@dataclass(frozen=True)
class ScoringOutput:
    """How similar two prompts are: the cosine of their embeddings."""

    score: float


@dataclass(frozen=True)
class ScoringRequestOutput:
    """The similarity of two prompts.

    Attributes:
        prompt_token_ids: of both, after expansion of media.
    """

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: Sequence[int]
    finished: bool


Output = RequestOutput | PoolingRequestOutput
"""What a step returns: an answer so far, or a finished embedding."""


@dataclass(frozen=True, kw_only=True)
class BeamSearchSequence:
    """One continuation.

    Attributes:
        tokens: generated ids (not the prompt's), the end-of-sequence id included.
        text: generated text.
        cum_logprob: sum of the tokens' log-probabilities.
        score: ``cum_logprob / len(tokens) ** length_penalty``; sequences are ordered by it.
        finish_reason: ``"stop"`` at an end-of-sequence id, ``"length"`` at the limit.
        logprobs: for each token itself and the best ones, by id; None unless they were asked for.
    """

    tokens: list[int]
    text: str
    cum_logprob: float
    score: float
    finish_reason: Literal["stop", "length"]
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True, kw_only=True)
class BeamSearchOutput:
    """The continuations of one prompt, best first; or why there are none."""

    sequences: list[BeamSearchSequence]
    error: RequestError | None = None


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters and gauges at one moment.

    Attributes:
        num_running, num_waiting: sequences.
        kv_blocks, kv_blocks_used: of the pool.
        prefix_queries, prefix_hits: blocks looked up and found when sequences were admitted.
        encoder_queries, encoder_hits: media items that steps needed, and found encoded.
        encoder_cache_bytes: of encoded media held now.
        media_queries, media_hits: media items that prompts needed preprocessed, and found preprocessed.
        media_cache_bytes: of preprocessed media held now.
        num_encoded: media items run through the encoder.
        num_preemptions: sequences preempted for want of blocks, so far.
        num_restarts: sequences computed again because they outgrew a length of `Positions.switch_lengths`.
        spec_decode_num_drafts: guesses at a sequence's next tokens that were verified, so far.
        spec_decode_num_draft_tokens: their tokens.
        spec_decode_num_accepted_tokens: of these, tokens that were right.
        spec_decode_num_accepted_tokens_per_pos: the latter by their place in the guess; empty without
            ``speculative_config``.
        weight_forms: form of weights -> linear layers that use it, e.g. ``{"int8": 96, "float32": 2}``.
    """

    num_running: int
    num_waiting: int
    kv_blocks: int
    kv_blocks_used: int
    prefix_queries: int
    prefix_hits: int
    encoder_queries: int
    encoder_hits: int
    encoder_cache_bytes: int
    media_queries: int
    media_hits: int
    media_cache_bytes: int
    num_encoded: int
    num_preemptions: int
    num_restarts: int
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    spec_decode_num_accepted_tokens_per_pos: tuple[int, ...] = ()
    weight_forms: Mapping[str, int] = field(default_factory=dict)


class Metric(NamedTuple):
    """One of `EngineStats` under its name for Prometheus."""

    name: str
    value: int


class Vector(Metric):
    """Several counts of `EngineStats` under one name, by their place in a guess. ``value`` is their sum."""

    values: tuple[int, ...]

    def __new__(cls, name: str, values: tuple[int, ...]) -> Vector:
        self = super().__new__(cls, name, sum(values))
        self.values = values
        return self
