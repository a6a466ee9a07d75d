"""MiniCPM-V: a vision tower and a resampler in front of a MiniCPM, Llama 3 or Qwen2 decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opsin.api import BuildContext, MappedMedia, Modality
from opsin.layers import TIMM_RENAMES, DecoderConfig, LanguageModel, RotaryTable
from opsin_models_minicpmv.config import language_config, top_config, vision_config
from opsin_models_minicpmv.resampler import Resampler
from opsin_models_minicpmv.versions import Version, version_of
from opsin_models_minicpmv.vision import ResampledTower, SliceTower


def scales(text: Mapping[str, Any], version: Version) -> Mapping[str, float]:
    """MiniCPM (2.0) carries hyperparameters over between widths by scales (Hu et al. 2024, section 3.1)."""
    if version != "2.0":
        return {}
    return {
        "embed_scale": text["scale_emb"],
        "residual_scale": text["scale_depth"] / math.sqrt(text["num_hidden_layers"]),
        "logit_scale": text["dim_model_base"] / text["hidden_size"],
    }


class MiniCPMV(LanguageModel):
    """See `opsin.api.Model`."""

    def __init__(self, context: BuildContext) -> None:
        config = context.config
        version = version_of(config)
        timm = version == "2.0"
        text, vision = language_config(config), vision_config(config)
        decoder = DecoderConfig.from_config(text, qkv_bias=version == "2.6", **scales(text, version))
        super().__init__(
            context,
            decoder,
            rotary=RotaryTable.from_config(text, decoder.head_size, context.device),
            renames={r"^llm\.": "", **(TIMM_RENAMES if timm else {r"^vpm\.": "vpm.tower."})},
        )
        self.vpm = (
            ResampledTower(context, vision) if timm else SliceTower(context, vision, flat=version == "2.5")
        )
        self.resampler = Resampler(
            context,
            num_queries=top_config(config)["query_num"],
            width=decoder.hidden_size,
            vision_width=vision.hidden_size,
            query_positions=timm,
        )

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """The slices of all items in one pass; images and videos differ only in their slices."""
        shapes = [shape for item in items for shape in item.geometry.patches]
        features = self.vpm(torch.cat([item.tensors["patches"] for item in items]), shapes)
        return list(self.resampler(features, shapes).split([item.num_embeds for item in items]))
