"""What crosses the wall between the engine and what computes its steps: plain numbers in, tensors out; and
media, where several ranks encode them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from opsin.api import MappedMedia, Modality


@dataclass(frozen=True, kw_only=True)
class StepInput:
    """All that a rank needs of a step besides media: no sequences, no pictures, no texts.

    Attributes:
        token_ids: of the T tokens; only rank 0 embeds them.
        positions: int64 (A, T), see `opsin.api.ForwardStep`.
        query_lens, context_lens, block_tables, slots: see `opsin.api.AttentionBatch`.
        logit_rows: of the T tokens, those whose logits are wanted, in this order.
        media_rows: of the T tokens, those that have further features, see `opsin.api.MediaFeatures`.
    """

    token_ids: Sequence[int]
    positions: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    slots: Sequence[int]
    logit_rows: Sequence[int]
    media_rows: Sequence[int] = ()

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.slots)


Embed = Callable[["Tensor"], "tuple[Tensor, Tensor | None]"]
"""Token ids int64 (T,) on the device -> embeddings (T, H) with media in their places, and the features
(rows of ``media_rows``, columns) of media that have further ones."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step gave, the same on all ranks.

    Attributes:
        hidden: (T, H) after the final norm.
        logits: (rows wanted, V).
    """

    hidden: Tensor
    logits: Tensor


@dataclass(frozen=True, kw_only=True)
class EncodeInput:
    """Media that a rank encodes by itself, while others encode theirs."""

    modality: Modality
    items: Sequence[MappedMedia]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a rank has encoded.

    Attributes:
        outputs: (E, H) of each item, in host memory; empty if there is an error.
        error: why they could not be encoded; the rank goes on.
    """

    outputs: Sequence[Tensor] = ()
    error: str = ""


def deal(sizes: Sequence[int], world_size: int) -> list[list[int]]:
    """Which items each rank gets: the largest first, each to the rank that has least (Graham 1969, LPT).

    Args:
        sizes: of the items.
        world_size: ranks.
    """
    ranks = [(0, rank) for rank in range(world_size)]
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, rank = heapq.heappop(ranks)
        dealt[rank].append(index)
        heapq.heappush(ranks, (load + sizes[index], rank))
    return dealt
