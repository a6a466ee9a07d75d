"""Qwen2.5-VL: the vision tower in front of a Qwen2.5 decoder with multimodal rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsin.api import BuildContext, MappedMedia, Modality
from opsin.layers import TIMM_RENAMES, DecoderConfig, LanguageModel, RotaryTable
from opsin_models_qwen25vl.config import read_config
from opsin_models_qwen25vl.inputs import VideoGrid
from opsin_models_qwen25vl.vision import VisionTower

RENAMES = {
    r"^model\.visual\.": "visual.",
    r"^model\.language_model\.": "model.",
    r"\.merger\.ln_q\.": ".merger.norm.",
    r"\.merger\.mlp\.0\.": ".merger.mlp.fc1.",
    r"\.merger\.mlp\.2\.": ".merger.mlp.fc2.",
    **TIMM_RENAMES,
}
"""The nested keys of newer exports are folded back."""


class Qwen25VL(LanguageModel):
    """See `opsin.api.Model`. Layouts of 3B (tied), 7B, 32B and 72B (untied)."""

    def __init__(self, context: BuildContext) -> None:
        text, vision = read_config(context.config)
        decoder = DecoderConfig.from_config(text, qkv_bias=True)
        rotary = RotaryTable.from_config(text, decoder.head_size, context.device, mrope=True)
        super().__init__(context, decoder, rotary=rotary, renames=RENAMES)
        self.visual = VisionTower(context, vision)

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """All items of a step in one pass; images and videos differ only in their grids."""
        patches = torch.cat([item.tensors["pixel_values"] for item in items])
        geometries = [item.geometry for item in items]
        return self.visual(patches, [g.grid if isinstance(g, VideoGrid) else g for g in geometries])
