"""Requests in progress: tokens are collected until every sample ends, or an embedding; outputs are made."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from opsin.api import ProcessedPrompt, Tokenizer
from opsin.engine.sequence import SampledToken, Sequence
from opsin.engine.text import Detokenizer, StopStrings
from opsin.errors import RequestError
from opsin.params import SamplingParams
from opsin.results import (
    CompletionOutput,
    EmbeddingOutput,
    FinishReason,
    Logprob,
    PoolingRequestOutput,
    RequestMetrics,
    RequestOutput,
)


@dataclass(slots=True, eq=False)
class _Sample:
    """One growing sample."""

    detokenizer: Detokenizer
    logprobs: list[dict[int, Logprob]] | None
    text: str = ""
    num_visible: int = 0
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    snapshot: CompletionOutput | None = None

    def output(self, index: int) -> CompletionOutput:
        """The state as a snapshot; the same object until something changes."""
        if self.snapshot is None:
            self.snapshot = CompletionOutput(
                index,
                self.text[: self.num_visible],
                self.token_ids.copy(),
                None if self.logprobs is None else self.cumulative_logprob,
                None if self.logprobs is None else self.logprobs.copy(),
                self.finish_reason,
                self.stop_reason,
            )
        return self.snapshot


class _Request:
    """What generating and embedding requests have in common: their sequences and their times.

    Attributes:
        sequences: live ones, by sample index.
        error: why the request failed, or None.
        metrics: times and counts so far.
    """

    def __init__(self, request_id: str, prompt: ProcessedPrompt, arrival_time: float) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.sequences: dict[int, Sequence] = {}
        self.error: RequestError | None = None
        self.metrics = RequestMetrics(arrival_time)

    def computed(self, sequence: Sequence, started: float) -> None:
        """Note that a step, which began at ``started``, has computed tokens of a sequence."""
        if self.metrics.first_scheduled_time is None:
            self._note(first_scheduled_time=started, num_cached_tokens=sequence.num_cached)
        if sequence.num_preemptions > self.metrics.num_preemptions:
            self._note(num_preemptions=sequence.num_preemptions)

    def _note(self, **changes: Any) -> None:
        self.metrics = replace(self.metrics, **changes)


class RequestState(_Request):
    """A generating request: collects tokens, decides when a sample ends, makes the outputs.

    Args:
        request_id: the caller's name for it.
        prompt: what was asked.
        params: sampling settings; ``params.n`` samples are collected.
        tokenizer: as for `Detokenizer`.
        eos_token_ids: ids that end a sample unless ``ignore_eos``.
        max_len: most tokens of prompt and output together.
        arrival_time: seconds of `time.monotonic`.
    """

    def __init__(
        self,
        request_id: str,
        prompt: ProcessedPrompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        max_len: int,
        arrival_time: float,
    ) -> None:
        super().__init__(request_id, prompt, arrival_time)
        self.params = params
        self._prompt_ids = list(prompt.token_ids)
        self._prompt_logprobs: list[dict[int, Logprob] | None] = []
        self._eos_ids = frozenset() if params.ignore_eos else eos_token_ids
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self._stop_strings = StopStrings(params.stop_strings) if params.stop_strings else None
        room = max_len - len(self._prompt_ids)
        self._max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self._samples = [
            _Sample(
                Detokenizer(tokenizer, prompt.token_ids, params.skip_special_tokens),
                logprobs=None if params.logprobs is None else [],
            )
            for _ in range(params.n)
        ]
        self._num_growing = params.n
        self._token_texts: dict[int, str] = {}

    def append(self, index: int, token: SampledToken) -> FinishReason | None:
        """Take sample ``index``'s next token.

        Returns:
            Why the sample ends with it, or None if it goes on.
        """
        sample = self._samples[index]
        assert sample.finish_reason is None, "no token after the end"
        if self.metrics.first_token_time is None:
            self._note(first_token_time=time.monotonic())
        params = self.params
        token_id = token.token_id
        sample.snapshot = None
        sample.token_ids.append(token_id)
        num_tokens = len(sample.token_ids)
        if sample.logprobs is not None:
            assert token.logprob is not None, "logprobs were asked for"
            sample.logprobs.append(self._describe(token))
            sample.cumulative_logprob += token.logprob

        reason: FinishReason | None = None
        is_eos = token_id in self._eos_ids
        if (is_eos or token_id in self._stop_ids) and num_tokens >= params.min_tokens:
            reason = "stop"
            sample.stop_reason = None if is_eos else token_id
        elif num_tokens >= self._max_tokens:
            reason = "length"
        if params.detokenize and (reason != "stop" or params.include_stop_str_in_output):
            piece = sample.detokenizer.push(token_id)
            if piece:
                num_old = len(sample.text)
                sample.text += piece
                if self._stop_strings is not None and reason != "stop" and num_tokens > params.min_tokens:
                    found = self._stop_strings.find(sample.text, num_old)
                    if found is not None:
                        start, string = found
                        end = start + len(string) if params.include_stop_str_in_output else start
                        sample.text = sample.text[:end]
                        sample.detokenizer.flush()  # what follows the stop string is not output
                        sample.stop_reason = string
                        reason = "stop"
        if reason is not None:
            self._end(sample, reason)
        elif self._stop_strings is None:
            sample.num_visible = len(sample.text)
        else:
            pending = self._stop_strings.num_pending(sample.text)
            sample.num_visible = max(sample.num_visible, len(sample.text) - pending)
        return reason

    def stop(self, error: RequestError | None = None) -> None:
        """End all samples that still grow: aborted, or with an error."""
        self.error = error
        for sample in self._samples:
            if sample.finish_reason is None:
                self._end(sample, "abort" if error is None else "error")

    def describe_prompt(self, first: int, tokens: SequenceOf[SampledToken]) -> None:
        """Take log-probabilities of consecutive prompt tokens, from index ``first`` on.

        Nothing predicts the prompt's first token. Tokens that were computed again come again.
        """
        known = self._prompt_logprobs or [None]
        self._prompt_logprobs = known + [self._describe(token) for token in tokens[len(known) - first :]]

    def output(self) -> RequestOutput:
        """Everything so far. Samples that have not changed are not copied again."""
        return RequestOutput(
            self.request_id,
            self.prompt.text,
            self._prompt_ids,
            self._prompt_logprobs if len(self._prompt_logprobs) == len(self._prompt_ids) else None,
            [sample.output(index) for index, sample in enumerate(self._samples)],
            self._num_growing == 0,
            self.metrics,
            self.error,
        )

    def _end(self, sample: _Sample, reason: FinishReason) -> None:
        sample.text += sample.detokenizer.flush()
        sample.num_visible = len(sample.text)
        sample.finish_reason = reason
        sample.snapshot = None
        self._num_growing -= 1
        if self._num_growing == 0:
            self._note(finished_time=time.monotonic())

    def _describe(self, token: SampledToken) -> dict[int, Logprob]:
        """The chosen token first, then the best ones."""
        assert token.logprob is not None, "logprobs were asked for"
        entries = {token.token_id: Logprob(token.logprob, token.rank, self._text_of(token.token_id))}
        for rank, (token_id, logprob) in enumerate(token.top, start=1):
            if token_id not in entries:
                entries[token_id] = Logprob(logprob, rank, self._text_of(token_id))
        return entries

    def _text_of(self, token_id: int) -> str:
        if token_id not in self._token_texts:
            self._token_texts[token_id] = self._samples[0].detokenizer.token_text(token_id)
        return self._token_texts[token_id]


class PoolingState(_Request):
    """An embedding request."""

    _output: EmbeddingOutput | None = None

    def complete(self, embedding: Tensor) -> None:
        """Take the embedding."""
        self._output = EmbeddingOutput(embedding)
        self.stop()

    def stop(self, error: RequestError | None = None) -> None:
        """End: complete, aborted, or with an error."""
        self.error = error
        now = time.monotonic()
        self._note(first_token_time=now, finished_time=now)

    def output(self) -> PoolingRequestOutput:
        """The embedding, or why there is none."""
        finished = self.metrics.finished_time is not None
        ids = list(self.prompt.token_ids)
        return PoolingRequestOutput(
            self.request_id, self.prompt.text, ids, self._output, finished, self.metrics, self.error
        )
