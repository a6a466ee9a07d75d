"""M-RoPE positions in which a video's steps stand as far apart as they are in time (Bai et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opsin.api import PlacedMedia, Positions
from opsin.layers import PositionBlock, mrope_positions, switch_lengths
from opsin_models_qwen25vl.config import read_config
from opsin_models_qwen25vl.inputs import VideoGrid


def positions(config: Mapping[str, Any], token_ids: Sequence[int], media: Sequence[PlacedMedia]) -> Positions:
    """Positions on the axes (time, height, width), int64 (3, L)."""
    language, vision = read_config(config)
    blocks = [_block(item, vision) for item in media]
    return mrope_positions(len(token_ids), blocks, switch_lengths=switch_lengths(language))


def _block(item: PlacedMedia, vision: Mapping[str, Any]) -> PositionBlock:
    geometry, merge = item.mapped.geometry, vision["spatial_merge_size"]
    grid = geometry.grid if isinstance(geometry, VideoGrid) else geometry
    steps: Sequence[int] | None = None
    if isinstance(geometry, VideoGrid):
        # In float32, as transformers does it: rounding decides where a step falls between two positions.
        apart = np.float32(geometry.seconds) * np.float32(vision["tokens_per_second"])
        steps = (np.arange(grid[0], dtype=np.float32) * apart).astype(np.int64).tolist()
    return PositionBlock(start=item.start, shape=(grid[0], grid[1] // merge, grid[2] // merge), steps=steps)
