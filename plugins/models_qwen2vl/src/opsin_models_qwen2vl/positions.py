"""M-RoPE positions (Qwen2-VL paper, section 2.1, "Multimodal Rotary Position Embedding")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opsin.api import PlacedMedia, Positions
from opsin.layers import switch_lengths
from opsin_models_qwen2vl.config import read_config


def mrope_positions(
    config: Mapping[str, Any], token_ids: Sequence[int], media: Sequence[PlacedMedia]
) -> Positions:
    """Positions on the axes (time, height, width), int64 (3, L).

    Text counts up on all axes at once. A medium of t x h x w merged patches begins one after the largest
    position so far; its tokens are at (start + frame, start + row, start + column), and the text after it
    starts one after the largest of those.
    """
    language, vision = read_config(config)
    merge = vision["spatial_merge_size"]
    pieces = []
    done, following = 0, 0  # tokens covered; next free position
    for item in media:
        text = np.arange(item.start - done) + following
        pieces.append(np.broadcast_to(text, (3, len(text))))
        following += len(text)
        frames, height, width = item.mapped.geometry
        shape = (frames, height // merge, width // merge)
        pieces.append(np.indices(shape).reshape(3, -1) + following)
        following += max(shape)
        done = item.end
    tail = np.arange(len(token_ids) - done) + following
    pieces.append(np.broadcast_to(tail, (3, len(tail))))
    positions = np.concatenate(pieces, axis=1).astype(np.int64)
    delta = following + len(tail) - len(token_ids)
    # Positions, not tokens, decide which frequencies a long sequence has.
    lengths = tuple(length - delta for length in switch_lengths(language))
    return Positions(prompt=positions, delta=delta, switch_lengths=lengths)
