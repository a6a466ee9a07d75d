"""Embedding requests: hidden states -> one vector per prompt, and the outputs that carry it."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import ProcessedPrompt
from opsin.errors import RequestError
from opsin.output import RequestMetrics
from opsin.sequence import Sequence


@dataclass(frozen=True)
class EmbeddingOutput:
    """One embedding.

    Attributes:
        data: float32 (H,), or (dimensions,).
    """

    data: Tensor

    @property
    def embedding(self) -> list[float]:
        """``data`` as a list."""
        return [float(value) for value in self.data.tolist()]


@dataclass(frozen=True)
class PoolingRequestOutput:
    """The answer to an embedding request.

    Attributes:
        request_id: as given.
        prompt: the text the user wrote, if it was text.
        prompt_token_ids: after expansion of media.
        outputs: the embedding; None if the request failed or was aborted.
        finished: always true once it is returned.
        metrics: times and cache hits.
        error: why it failed, or None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: SequenceOf[int]
    outputs: EmbeddingOutput | None
    finished: bool
    metrics: RequestMetrics
    error: RequestError | None = None


class PoolingState:
    """An embedding request on its way.

    Attributes:
        first_scheduled_time, num_cached_tokens, num_preemptions: set by the engine.
        error: why the request failed, or None.
    """

    def __init__(self, request_id: str, prompt: ProcessedPrompt, arrival_time: float) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.first_scheduled_time: float | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.error: RequestError | None = None
        self._arrival_time = arrival_time
        self._finished_time: float | None = None
        self._output: EmbeddingOutput | None = None

    def complete(self, embedding: Tensor) -> None:
        """Take the embedding."""
        self._output = EmbeddingOutput(embedding)
        self._finished_time = time.monotonic()

    def fail(self, error: RequestError) -> None:
        """The request cannot be served."""
        self.error = error
        self._finished_time = time.monotonic()

    def finish(self, index: int, reason: str) -> None:
        """End without an embedding (an abort)."""
        self._finished_time = time.monotonic()

    def output(self) -> PoolingRequestOutput:
        """What there is."""
        metrics = RequestMetrics(
            arrival_time=self._arrival_time,
            first_scheduled_time=self.first_scheduled_time,
            first_token_time=self._finished_time,
            finished_time=self._finished_time,
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
        )
        ids = list(self.prompt.token_ids)
        finished = self._finished_time is not None
        return PoolingRequestOutput(
            self.request_id, self.prompt.text, ids, self._output, finished, metrics, self.error
        )


def pool(sequence: Sequence, start: int, hidden: Tensor) -> Tensor | None:
    """Take the hidden states of a chunk; gives the embedding when it was the last one.

    Args:
        sequence: an embedding request's.
        start: index of the chunk's first token.
        hidden: (tokens, H) after the final norm.

    Returns:
        float32 (H,) or (dimensions,) in host memory; None if more chunks are to come.
    """
    assert sequence.pooling is not None
    end = start + len(hidden)
    if sequence.pooling.type == "last":
        pooled = hidden[-1].float()
    elif sequence.pooling.type == "cls":
        pooled = hidden[0].float() if start == 0 or sequence.pooled is None else sequence.pooled
    else:
        total = hidden.float().sum(0)
        pooled = total if start == 0 or sequence.pooled is None else sequence.pooled + total
    sequence.pooled = pooled
    if end < sequence.num_tokens:
        return None
    if sequence.pooling.type == "mean":
        pooled = pooled / end
    pooled = pooled[: sequence.dimensions]
    if not bool(torch.isfinite(pooled).all()):
        raise RequestError("the model gave an embedding that is not finite")
    return (F.normalize(pooled, dim=0) if sequence.pooling.normalize else pooled).cpu()
