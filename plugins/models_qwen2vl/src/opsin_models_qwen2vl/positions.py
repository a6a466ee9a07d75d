"""M-RoPE positions (Qwen2-VL paper, section 2.1, "Multimodal Rotary Position Embedding")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsin.api import PlacedMedia, Positions
from opsin.layers import PositionBlock, switch_lengths
from opsin.layers import mrope_positions as positions_of_blocks
from opsin_models_qwen2vl.config import read_config


def mrope_positions(
    config: Mapping[str, Any], token_ids: Sequence[int], media: Sequence[PlacedMedia]
) -> Positions:
    """Positions on the axes (time, height, width), int64 (3, L); a video's steps count 0, 1, 2, ..."""
    language, vision = read_config(config)
    merge = vision["spatial_merge_size"]
    blocks = []
    for item in media:
        steps, height, width = item.mapped.geometry
        blocks.append(PositionBlock(start=item.start, shape=(steps, height // merge, width // merge)))
    return positions_of_blocks(len(token_ids), blocks, switch_lengths=switch_lengths(language))
