"""Pictures, videos and embeddings -> Qwen2.5-VL's tensors; placeholders -> runs of pad tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsin.api import InputContext, MediaItem, Placeholder
from opsin.layers import (
    Grid,
    GridMapper,
    Patching,
    TimedGridMapper,
    fields,
    step_seconds,
    token_placeholder,
)
from opsin_models_qwen25vl.config import read_config

FPS = 2.0
"""At which the family samples videos; where neither the video, nor the user, nor the settings say it."""


@dataclass(frozen=True)
class VideoGrid:
    """What the model knows of a video.

    Attributes:
        grid: steps, rows and columns, in patches.
        seconds: from one step to the next.
    """

    grid: Grid
    seconds: float


class ImageMapper(GridMapper):
    """Images: one frame, doubled to fill the temporal patch."""

    def __init__(self, context: InputContext) -> None:
        _, vision = read_config(context.config)
        bounds = (56 * 56, 28 * 28 * 1280)
        super().__init__("image", Patching.from_config(context.preprocessor, vision, bounds))


class VideoMapper(TimedGridMapper):
    """Videos: frames in pairs; an odd last frame is doubled."""

    timing = "second_per_grid_ts"

    def __init__(self, context: InputContext) -> None:
        _, vision = read_config(context.config)
        settings = context.video_preprocessor or context.preprocessor
        patching = Patching.from_config(settings, vision, (128 * 28 * 28, 28 * 28 * 768))
        super().__init__(patching, fields(settings, {"fps": float | None})["fps"] or FPS)

    def geometry(self, item: MediaItem, grid: Grid, options: Mapping[str, Any]) -> VideoGrid:
        """The grid, and how many seconds a step takes."""
        timing = None if item.embeds is None else item.embeds.get("timing")
        if timing is None:
            times = self.frame_times(item, grid, options)
            return VideoGrid(grid, step_seconds(times, self.patching.temporal_patch_size))
        if len(timing) != 1 or float(timing[0]) < 0:
            raise ValueError(f"{self.timing} of a video is {timing.tolist()}; expected one number of seconds")
        return VideoGrid(grid, float(timing[0]))


def placeholder(context: InputContext, token: str, config_key: str) -> Placeholder:
    """One pad token in the text becomes one per embedding."""
    return token_placeholder(context, token, config_key, f"<|vision_start|>{token}<|vision_end|>")
