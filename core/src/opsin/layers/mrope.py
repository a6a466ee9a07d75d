"""Positions on several axes (M-RoPE): text counts up on all of them, media by time, row and column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from opsin.api import PlacedMedia, Positions


@dataclass(frozen=True, kw_only=True)
class PositionBlock:
    """Embeddings of a medium, or of a step of a video, that stand next to each other in a prompt.

    Attributes:
        start: index of the first of them.
        shape: steps, rows and columns, in embeddings.
        steps: position of each step on the axis of time, from 0, ascending; None: 0, 1, 2, ...
    """

    start: int
    shape: tuple[int, int, int]
    steps: Sequence[int] | None = None


def mrope_positions(
    num_tokens: int, blocks: Iterable[PositionBlock], *, switch_lengths: Sequence[int] = ()
) -> Positions:
    """Positions on the axes (time, height, width), int64 (3, L).

    A block begins one after the largest position so far; its tokens are at (start + step, start + row,
    start + column), and the text after it starts one after the largest of those (Wang et al. 2024, section
    2.1).

    Args:
        num_tokens: L, of the expanded prompt.
        blocks: in order of their start.
        switch_lengths: `opsin.layers.switch_lengths` of the language model. Positions, not tokens, decide
            which frequencies a long sequence has.
    """
    pieces = []
    done, following = 0, 0  # tokens covered; next free position
    for block in blocks:
        text = np.arange(block.start - done) + following
        pieces.append(np.broadcast_to(text, (3, len(text))))
        following += len(text)
        places = np.indices(block.shape).reshape(3, -1)
        if block.steps is not None:
            places[0] = np.asarray(block.steps, dtype=np.int64)[places[0]]
        pieces.append(places + following)
        following += int(places.max()) + 1
        done = block.start + places.shape[1]
    tail = np.arange(num_tokens - done) + following
    pieces.append(np.broadcast_to(tail, (3, len(tail))))
    delta = following + len(tail) - num_tokens
    return Positions(
        prompt=np.concatenate(pieces, axis=1).astype(np.int64),
        delta=delta,
        switch_lengths=tuple(length - delta for length in switch_lengths),
    )


def embed_runs(item: PlacedMedia) -> list[tuple[int, int]]:
    """(start, length) of each run of embeddings of an item; ids such as marks or times stand between them."""
    places = np.flatnonzero(np.asarray(item.is_embed, dtype=bool))
    ends = np.flatnonzero(np.diff(places) > 1) + 1
    return [(item.start + int(run[0]), len(run)) for run in np.split(places, ends) if len(run)]
