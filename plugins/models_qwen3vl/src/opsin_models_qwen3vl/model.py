"""Qwen3-VL: the vision tower in front of a Qwen3 decoder whose first layers get further features of media."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsin.api import BuildContext, MappedMedia, Modality
from opsin.layers import TIMM_RENAMES, DecoderConfig, LanguageModel, RotaryTable
from opsin_models_qwen3vl.config import read_config
from opsin_models_qwen3vl.inputs import VideoGrid
from opsin_models_qwen3vl.vision import VisionTower

RENAMES = {
    r"^model\.visual\.": "visual.",
    r"^model\.language_model\.": "model.",
    r"\.mlp\.linear_fc([12])\.": r".mlp.fc\1.",
    r"\.linear_fc([12])\.": r".mlp.fc\1.",
    **TIMM_RENAMES,
}


class Qwen3VL(LanguageModel):
    """See `opsin.api.Model`. Layouts of 2B and 4B (tied), 8B and 32B (untied)."""

    def __init__(self, context: BuildContext) -> None:
        text, vision = read_config(context.config)
        decoder = DecoderConfig.from_config(text, qk_norm=True)
        super().__init__(
            context,
            decoder,
            rotary=RotaryTable.from_config(
                text, decoder.head_size, context.device, mrope=True, interleaved=True
            ),
            renames=RENAMES,
            deep_layers=len(vision["deepstack_visual_indexes"]),
        )
        self.visual = VisionTower(context, vision)

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """All items of a step in one pass; images and videos differ only in their grids."""
        patches = torch.cat([item.tensors["pixel_values"] for item in items])
        geometries = [item.geometry for item in items]
        return self.visual(patches, [g.grid if isinstance(g, VideoGrid) else g for g in geometries])
