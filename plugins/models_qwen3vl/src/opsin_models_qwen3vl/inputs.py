"""Pictures, videos and embeddings -> Qwen3-VL's tensors; placeholders -> pad tokens, and times for videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsin.api import InputContext, MappedMedia, MediaItem, Placeholder, expand_by_text
from opsin.layers import (
    Grid,
    GridMapper,
    Patching,
    TimedGridMapper,
    fields,
    step_times,
    token_placeholder,
)
from opsin_models_qwen3vl.config import read_config

FPS = 2.0
"""At which the family samples videos; where neither the video, nor the user, nor the settings say it."""

START, PAD, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"

PUBLISHED: Mapping[str, Any] = {
    "patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
}
"""Settings of published checkpoints, for one without any: the class's defaults are another family's."""


@dataclass(frozen=True)
class VideoGrid:
    """What the model knows of a video.

    Attributes:
        grid: steps, rows and columns, in patches.
        times: of each step, in seconds.
        merge: patches of a side of an embedding.
        wrapped: whether marks stand around all of the video, too.
    """

    grid: Grid
    times: tuple[float, ...]
    merge: int
    wrapped: bool


class ImageMapper(GridMapper):
    """Images: one frame, doubled to fill the temporal patch."""

    def __init__(self, context: InputContext) -> None:
        _, vision = read_config(context.config)
        settings = context.preprocessor or PUBLISHED
        bounds = (56 * 56, 28 * 28 * 1280)
        super().__init__("image", Patching.from_config(settings, vision, bounds))


class VideoMapper(TimedGridMapper):
    """Videos: frames in pairs; an odd last frame is doubled. Bounds of the area are those of all frames."""

    timing = "timestamps"
    option_names = TimedGridMapper.option_names | {"wrap_video"}

    def __init__(self, context: InputContext) -> None:
        _, vision = read_config(context.config)
        settings = context.video_preprocessor or context.preprocessor
        patching = Patching.from_config(
            settings,
            vision,
            (128 * 32 * 32, 32 * 32 * 768),
            patch_size=16,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            whole_video=True,
        )
        super().__init__(patching, fields(settings, {"fps": float | None})["fps"] or FPS)

    def geometry(self, item: MediaItem, grid: Grid, options: Mapping[str, Any]) -> VideoGrid:
        """The grid, and the time of each step."""
        wrapped = options.get("wrap_video", False)
        if not isinstance(wrapped, bool):
            raise ValueError(f"wrap_video={wrapped!r}: expected true or false")
        timing = None if item.embeds is None else item.embeds.get("timing")
        if timing is None:
            times = step_times(self.frame_times(item, grid, options), self.patching.temporal_patch_size)
        else:
            times = timing.tolist()
        if len(times) != grid[0] or min(times) < 0:
            raise ValueError(
                f"{self.timing} of a video are {times!r:.80}; expected seconds of each of its {grid[0]} steps"
            )
        return VideoGrid(grid, tuple(times), self.patching.merge_size, wrapped)


def image_placeholder(context: InputContext) -> Placeholder:
    """One pad token in the text becomes one per embedding."""
    return token_placeholder(context, "<|image_pad|>", "image_token_id", f"{START}<|image_pad|>{END}")


def video_placeholder(context: InputContext) -> Placeholder:
    """The pad token and its marks become, for each step, its time in words and its embeddings in marks."""
    given: int | None = fields(context.config, {"video_token_id": int | None})["video_token_id"]
    pad = context.tokenizer.convert_tokens_to_ids(PAD) if given is None else given

    def expand_text(mapped: MappedMedia, _number: int) -> str:
        video: VideoGrid = mapped.geometry
        step = START + PAD * (video.grid[1] * video.grid[2] // video.merge**2) + END
        text = "".join(f"<{seconds:.1f} seconds>{step}" for seconds in video.times)
        return f"{START}{text}{END}" if video.wrapped else text

    return Placeholder(
        text=lambda number: f"{START}{PAD}{END}",
        expand=expand_by_text(context.tokenizer, expand_text, pad),
        expand_text=expand_text,
        embed_token_id=pad,
    )
