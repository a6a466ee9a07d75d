"""M-RoPE positions in which each step of a video is a picture of its own, between words that say its time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opsin.api import PlacedMedia, Positions
from opsin.layers import PositionBlock, embed_runs, mrope_positions, switch_lengths
from opsin_models_qwen3vl.config import read_config
from opsin_models_qwen3vl.inputs import VideoGrid


def positions(config: Mapping[str, Any], token_ids: Sequence[int], media: Sequence[PlacedMedia]) -> Positions:
    """Positions on the axes (time, height, width), int64 (3, L)."""
    language, vision = read_config(config)
    blocks = _blocks(media, vision["spatial_merge_size"])
    return mrope_positions(len(token_ids), blocks, switch_lengths=switch_lengths(language))


def _blocks(media: Sequence[PlacedMedia], merge: int) -> Iterator[PositionBlock]:
    for item in media:
        geometry = item.mapped.geometry
        _, height, width = geometry.grid if isinstance(geometry, VideoGrid) else geometry
        for start, _ in embed_runs(item):
            yield PositionBlock(start=start, shape=(1, height // merge, width // merge))
