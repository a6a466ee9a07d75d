"""Pictures, videos and embeddings -> Qwen2-VL's tensors; placeholders -> runs of pad tokens."""

from __future__ import annotations

from opsin.api import InputContext, Placeholder
from opsin.layers import GridMapper, Patching, token_placeholder
from opsin_models_qwen2vl.config import read_config


class ImageMapper(GridMapper):
    """Images: one frame, doubled to fill the temporal patch."""

    def __init__(self, context: InputContext) -> None:
        _, vision = read_config(context.config)
        bounds = (56 * 56, 28 * 28 * 1280)
        super().__init__("image", Patching.from_config(context.preprocessor, vision, bounds))


class VideoMapper(GridMapper):
    """Videos: frames in pairs; an odd last frame is doubled."""

    def __init__(self, context: InputContext) -> None:
        _, vision = read_config(context.config)
        settings = context.video_preprocessor or context.preprocessor
        bounds = (128 * 28 * 28, 28 * 28 * 768)
        super().__init__("video", Patching.from_config(settings, vision, bounds))


def placeholder(context: InputContext, token: str, config_key: str) -> Placeholder:
    """One pad token in the text becomes one per embedding."""
    return token_placeholder(context, token, config_key, f"<|vision_start|>{token}<|vision_end|>")
