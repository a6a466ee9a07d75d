"""The state of one sequence: its tokens, how far they are computed, where they are cached."""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from opsin.api import PlacedMedia, Pooling, ProcessedPrompt
from opsin.inputs.grammar import Grammar
from opsin.params import SamplingParams


class SampledToken(NamedTuple):
    """One chosen token.

    Attributes:
        token_id: the token.
        logprob: its log-probability in the raw distribution (natural logarithm); None unless asked for.
        top: the k best (token id, logprob) of the raw distribution, best first; empty unless asked for.
        rank: 1 + how many tokens of the raw distribution are more probable; None unless asked for.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class Status(enum.Enum):
    """The state of a sequence. Prefill and decode are one: there are only tokens not yet computed."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One sequence of tokens being computed (a request with n samples has n of them).

    Attributes:
        seq_id: unique in the engine.
        request_id: the request it belongs to.
        index: which of its samples.
        eos_token_ids: ids at which the model ends.
        token_ids: prompt, then output.
        num_computed: leading tokens whose keys and values are in the cache.
        num_cached: how many of them the prefix cache supplied when the sequence was admitted.
        block_ids: the cache blocks holding them, in order.
        block_keys: prefix-cache keys of the leading full blocks, as far as they were needed.
        generator: this sequence's own random source, None for greedy.
        pooling: how its hidden states become an embedding; None: tokens are generated.
        dimensions: leading dimensions of the embedding to keep; None: all.
        pooled: sum of the hidden states so far, where an embedding is their mean, or the first one.
        grammar: constraint on its tokens, None if there is none.
        bad_words: token ids of texts, which are never generated one after the other.
        sampler_state: what the sampler has prepared for it.
        drafter_state: what the drafter has prepared for it.
    """

    seq_id: int
    request_id: str
    index: int
    prompt: ProcessedPrompt
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    status: Status = Status.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    generator: torch.Generator | None = None
    pooling: Pooling | None = None
    dimensions: int | None = None
    pooled: torch.Tensor | None = None
    grammar: Grammar | None = None
    bad_words: SequenceOf[SequenceOf[int]] = ()
    sampler_state: Any = None
    drafter_state: Any = None

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.prompt.token_ids)

    @property
    def num_prompt(self) -> int:
        """Prompt tokens, after expansion."""
        return len(self.prompt.token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens not yet computed; 1 in steady decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_ids(self) -> list[int]:
        """Generated tokens (a copy)."""
        return self.token_ids[self.num_prompt :]

    @property
    def num_output(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids) - self.num_prompt

    @property
    def priority(self) -> int:
        """Smaller numbers are computed first."""
        return self.params.priority

    @property
    def media(self) -> SequenceOf[PlacedMedia]:
        """Media of the prompt, in order of their start."""
        return self.prompt.media

    @property
    def variant(self) -> int:
        """How a sequence of this length is computed, see `Positions.switch_lengths`."""
        positions = self.prompt.positions
        return 0 if positions is None else bisect_left(positions.switch_lengths, len(self.token_ids))

    @property
    def switch_length(self) -> int | None:
        """Longest length that is computed as this one is; None: any longer one is. See `variant`."""
        positions = self.prompt.positions
        lengths = () if positions is None else positions.switch_lengths
        return lengths[self.variant] if self.variant < len(lengths) else None
