"""From tokens to what the user sees: incremental text, stop strings, `RequestOutput`. Names are vLLM's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from opsin.api import ProcessedPrompt, Tokenizer
from opsin.config import SamplingParams
from opsin.errors import RequestError

if TYPE_CHECKING:
    from opsin.sampler import SampledToken

FinishReason = Literal["stop", "length", "abort", "error"]

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes bytes to that are not UTF-8: also what half a character looks like."""

MAX_HALF = 3
"""Most replacement characters that half a character can look like: a UTF-8 character has up to 4 bytes."""


# --------------------------------------------------------------------------------------------------
# What the user gets
# --------------------------------------------------------------------------------------------------


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
    """One sample of a request, as far as it is generated.

    Attributes:
        index: which sample.
        text: generated text; while it grows, without what may become part of a stop string.
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


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened, in seconds of `time.monotonic`, and what was saved.

    Attributes:
        arrival_time: the request came in.
        first_scheduled_time: its first tokens were computed.
        first_token_time: its first token was there.
        finished_time: its last sample ended.
        num_cached_tokens: prompt tokens taken from the prefix cache.
        num_preemptions: how often one of its samples had to give way and be computed again.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request, as far as it is computed. A snapshot: later tokens are in later ones.

    Attributes:
        request_id: as given.
        prompt: the text the user wrote, if it was text.
        prompt_token_ids: after expansion of media.
        prompt_logprobs: None first (nothing predicts the first token), then as in `CompletionOutput`.
        outputs: one per sample.
        finished: whether all samples have ended.
        metrics: times and counts.
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


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


class Detokenizer:
    """Turns token ids into text piece by piece, in constant time per token.

    Each token is decoded behind a few earlier ones, because tokenizers decode the first token of a text
    differently (sentencepiece drops its leading space). Pieces put together equal the text decoded at
    once; docs/decisions/0031-detokenisation.md names the one case where they cannot.

    Args:
        tokenizer: with ``clean_up_tokenization_spaces`` off.
        prompt_ids: what the text follows; only the last few matter.
        skip_special_tokens: leave special tokens out.
    """

    WINDOW = 4
    """Tokens of context kept; twice as many are let grow before they are cut back."""

    MAX_HELD = 16
    """Tokens held back at most while no complete character comes (only garbage does that)."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._decoder = getattr(tokenizer, "backend_tokenizer", tokenizer)  # transformers' wrapper costs 5x
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []
        self._text = ""
        self._shown = 0
        self._adopt(prompt_ids)

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that it completes, never ending in half a character."""
        held = self._held
        held.append(token_id)
        text = self._decode_held()
        if text and text[-1] != REPLACEMENT:
            piece = text[self._shown :]
            self._settle(text)
            return piece
        # The last few replacement characters may be half a character; what is before them is final.
        stable = max(len(text.rstrip(REPLACEMENT)), len(text) - MAX_HALF)
        piece = text[self._shown : stable]
        self._text, self._shown = text, max(self._shown, stable)
        if len(held) > self.MAX_HELD:
            self._drop_oldest_held()
        return piece

    def flush(self) -> str:
        """What is still held back: half a character comes out as U+FFFD. Call it once, at the end."""
        piece = self._text[self._shown :]
        self._held, self._text, self._shown = [], "", 0
        return piece

    def token_text(self, token_id: int) -> str:
        """Text of one token as it reads after other text; special tokens included."""
        alone: str = self._decoder.decode([token_id], skip_special_tokens=False)
        if not self._context:
            return alone
        context: str = self._decoder.decode(self._context, skip_special_tokens=False)
        both: str = self._decoder.decode([*self._context, token_id], skip_special_tokens=False)
        return both[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._decoder.decode(ids, skip_special_tokens=self._skip)
        return text

    def _decode_held(self) -> str:
        """Text of the held tokens behind the context."""
        text = self._decode(self._context + self._held)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # The context ends in byte tokens, and sentencepiece decodes a run of them as a whole: bytes that are
        # not a character (yet) spoil it. It has been shown; what is held begins with bytes and needs none.
        return self._decode(self._held)

    def _adopt(self, prompt_ids: Sequence[int]) -> None:
        """Take the longest short suffix of the prompt that reads as whole characters as context."""
        tail = list(prompt_ids[-2 * self.WINDOW - MAX_HALF :])
        for num_held in range(MAX_HALF + 1):  # a prompt of token ids may end in half a character
            end = len(tail) - num_held
            for start in range(max(0, end - 2 * self.WINDOW), end):
                text = self._decode(tail[start:end])
                if text and REPLACEMENT not in text:
                    self._context, self._context_text = tail[start:end], text
                    self._held = tail[end:]
                    return

    def _settle(self, text: str) -> None:
        """All held tokens are final: go on behind them."""
        if len(self._held) == 1 or not self._context:
            self._context += self._held
            self._context_text += text
            if len(self._context) > 2 * self.WINDOW:
                shorter = self._context[-self.WINDOW :]
                shorter_text = self._decode(shorter)
                if shorter_text and REPLACEMENT not in shorter_text:
                    self._context, self._context_text = shorter, shorter_text
        # A character of several tokens does not become context: cut in its middle it would be garbage.
        self._held, self._text, self._shown = [], "", 0

    def _drop_oldest_held(self) -> None:
        """Keep garbage from growing; what was not shown yet stays."""
        unshown = len(self._text) - self._shown
        self._held = self._held[-(self.MAX_HELD - self.WINDOW) :]
        self._text = self._decode_held()
        self._shown = max(0, len(self._text) - unshown)


class StopStrings:
    """Finds stop strings in growing text, and how much of its end may still become one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._prefixes = {string[:size] for string in strings for size in range(1, len(string))}
        self._longest = max((len(prefix) for prefix in self._prefixes), default=0)

    def find(self, text: str, num_old: int) -> tuple[int, str] | None:
        """The first stop string to be complete, if it ends after the ``num_old`` characters already searched.

        Returns:
            Where it starts, and the string. Of several that end together, the longest.
        """
        found: tuple[int, int, str] | None = None
        for string in self._strings:
            start = text.find(string, max(0, num_old - len(string) + 1))
            if start >= 0 and (found is None or (start + len(string), start) < found[:2]):
                found = (start + len(string), start, string)
        return None if found is None else (found[1], found[2])

    def num_pending(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self._prefixes:
                return size
        return 0


# --------------------------------------------------------------------------------------------------
# One request
# --------------------------------------------------------------------------------------------------


class _Sample:
    """One growing sample."""

    __slots__ = (
        "cumulative_logprob",
        "detokenizer",
        "finish_reason",
        "logprobs",
        "num_visible",
        "snapshot",
        "stop_reason",
        "text",
        "token_ids",
    )

    def __init__(self, detokenizer: Detokenizer, wants_logprobs: bool) -> None:
        self.detokenizer = detokenizer
        self.text = ""
        self.num_visible = 0
        self.token_ids: list[int] = []
        self.cumulative_logprob = 0.0
        self.logprobs: list[dict[int, Logprob]] | None = [] if wants_logprobs else None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.snapshot: CompletionOutput | None = None

    def output(self, index: int) -> CompletionOutput:
        """The state as a snapshot; the same object until something changes."""
        if self.snapshot is None:
            wants_logprobs = self.logprobs is not None
            self.snapshot = CompletionOutput(
                index,
                self.text[: self.num_visible],
                self.token_ids.copy(),
                self.cumulative_logprob if wants_logprobs else None,
                self.logprobs.copy() if self.logprobs is not None else None,
                self.finish_reason,
                self.stop_reason,
            )
        return self.snapshot


class RequestState:
    """A request on its way: collects tokens, decides when a sample ends, makes the outputs.

    Args:
        request_id: the caller's name for it.
        prompt: the processed prompt.
        params: sampling settings; ``params.n`` samples are collected.
        tokenizer: see `Detokenizer`.
        eos_token_ids: ids that end a sample unless ``ignore_eos``.
        max_len: most tokens of prompt and output together.
        arrival_time: seconds of `time.monotonic`.

    Attributes:
        first_scheduled_time, num_cached_tokens, num_preemptions: set by the engine; see `RequestMetrics`.
        error: why the request failed, or None.
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
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.first_scheduled_time: float | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.error: RequestError | None = None
        self._arrival_time = arrival_time
        self._first_token_time: float | None = None
        self._finished_time: float | None = None
        self._prompt_ids = list(prompt.token_ids)
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._eos_ids = frozenset() if params.ignore_eos else eos_token_ids
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self._stop_strings = StopStrings(params.stop_strings) if params.stop_strings else None
        room = max_len - len(self._prompt_ids)
        self._max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self._samples = [
            _Sample(
                Detokenizer(tokenizer, prompt.token_ids, params.skip_special_tokens),
                params.logprobs is not None,
            )
            for _ in range(params.n)
        ]
        self._num_growing = params.n
        self._token_texts: dict[int, str] = {}

    @property
    def finished(self) -> bool:
        """Whether all samples have ended."""
        return self._num_growing == 0

    def append(self, index: int, token: SampledToken) -> FinishReason | None:
        """Take sample ``index``'s next token.

        Returns:
            Why the sample ends with it, or None if it goes on.
        """
        sample = self._samples[index]
        assert sample.finish_reason is None, "no token after the end"
        if self._first_token_time is None:
            self._first_token_time = time.monotonic()
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
        if reason != "stop" or params.include_stop_str_in_output:
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
                        sample.detokenizer.flush()  # what comes behind the stop string is not output
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

    def finish(self, index: int, reason: FinishReason) -> None:
        """End sample ``index`` from outside (an abort). Nothing happens if it has ended already."""
        sample = self._samples[index]
        if sample.finish_reason is None:
            self._end(sample, reason)

    def fail(self, error: RequestError) -> None:
        """End all samples that still grow: the request cannot be served."""
        self.error = error
        for index in range(len(self._samples)):
            self.finish(index, "error")

    def set_prompt_logprobs(self, tokens: Sequence[SampledToken]) -> None:
        """Take the log-probabilities of all prompt tokens but the first."""
        assert len(tokens) == len(self._prompt_ids) - 1, "one entry per predicted prompt token"
        self._prompt_logprobs = [None, *map(self._describe, tokens)]

    def output(self) -> RequestOutput:
        """Everything so far. Costs what changed, not what is there."""
        return RequestOutput(
            self.request_id,
            self.prompt.text,
            self._prompt_ids,
            self._prompt_logprobs,
            [sample.output(index) for index, sample in enumerate(self._samples)],
            self._num_growing == 0,
            RequestMetrics(
                self._arrival_time,
                self.first_scheduled_time,
                self._first_token_time,
                self._finished_time,
                self.num_cached_tokens,
                self.num_preemptions,
            ),
            self.error,
        )

    def _end(self, sample: _Sample, reason: FinishReason) -> None:
        sample.text += sample.detokenizer.flush()
        sample.num_visible = len(sample.text)
        sample.finish_reason = reason
        sample.snapshot = None
        self._num_growing -= 1
        if self._num_growing == 0:
            self._finished_time = time.monotonic()

    def _describe(self, token: SampledToken) -> dict[int, Logprob]:
        """The chosen token first, then the best ones."""
        assert token.logprob is not None, "logprobs were asked for"
        entries = {token.token_id: Logprob(token.logprob, token.rank, self._text_of(token.token_id))}
        for rank, (token_id, logprob) in enumerate(token.top, start=1):
            if token_id not in entries:
                entries[token_id] = Logprob(logprob, rank, self._text_of(token_id))
        return entries

    def _text_of(self, token_id: int) -> str:
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._samples[0].detokenizer.token_text(token_id)
            self._token_texts[token_id] = text
        return text
