"""MiniCPM-V: a vision tower and a resampler in front of a MiniCPM, Llama 3 or Qwen2 decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opsin.api import BuildContext, ForwardStep, MappedMedia, Modality
from opsin.layers import Decoder, DecoderConfig, RotaryTable, kv_geometry, output_head
from opsin_models_minicpmv.resampler import Resampler
from opsin_models_minicpmv.versions import Version, version_of
from opsin_models_minicpmv.vision import ResampledTower, SliceTower, vision_config

_TIMM_NAMES = (
    ("vpm.patch_embed.proj.", "vpm.patch_embed."),
    ("vpm.blocks.", "vpm.encoder.layers."),
    (".attn.qkv.", ".self_attn.qkv_proj."),
    (".attn.proj.", ".self_attn.out_proj."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)


def decoder_config(config: Mapping[str, Any], version: Version) -> DecoderConfig:
    """The language model of a version; its fields stand at the top of config.json.

    Raises:
        ValueError: it asks for scaled rotary positions, which no published version does.
    """
    if config.get("rope_scaling"):
        raise ValueError(f"rope_scaling {config['rope_scaling']!r} is not supported for MiniCPM-V")
    changes: dict[str, Any] = {"qkv_bias": version == "2.6"}
    if version == "2.0":
        # MiniCPM (Hu et al. 2024, section 3.1): scales that carry hyperparameters over between widths.
        changes |= {
            "embed_scale": config["scale_emb"],
            "residual_scale": config["scale_depth"] / math.sqrt(config["num_hidden_layers"]),
            "logit_scale": config["dim_model_base"] / config["hidden_size"],
        }
    return DecoderConfig.from_config(config, **changes)


class MiniCPMV(nn.Module):
    """See `opsin.api.Model`."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        config = context.config
        self._kind = version_of(config)
        decoder = decoder_config(config, self._kind)
        vision = vision_config(config)
        self.hidden_size, self.vocab_size = decoder.hidden_size, decoder.vocab_size
        self.kv_geometry = kv_geometry(decoder, context.parallel.world_size)
        timm = self._kind == "2.0"
        self.vpm = (
            ResampledTower(context, vision) if timm else SliceTower(context, vision, flat=self._kind == "2.5")
        )
        self.resampler = Resampler(
            context,
            num_queries=config["query_num"],
            width=decoder.hidden_size,
            vision_width=vision.hidden_size,
            query_positions=timm,
        )
        rotary = RotaryTable(decoder.head_size, config.get("rope_theta", 10000.0), device=context.device)
        head = output_head(context, decoder)
        self.model = Decoder(context, decoder, rotary=rotary, head=head)
        # A tied head takes no weights of its own: kept out of the module tree.
        self._head, self._tied = [head], decoder.tied
        if not decoder.tied:
            self.lm_head = head

    def weight_name(self, key: str) -> str | None:
        """The hub's keys; timm's names of 2.0 become those of the layers used."""
        if key == "llm.lm_head.weight" and self._tied:
            return None
        if key.startswith("vpm."):
            if self._kind != "2.0":
                return "vpm.tower." + key.removeprefix("vpm.")
            for theirs, ours in _TIMM_NAMES:
                key = key.replace(theirs, ours)
        return key.removeprefix("llm.")

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """The slices of all items in one pass; images and videos differ only in their slices."""
        shapes = [shape for item in items for shape in item.geometry.patches]
        features = self.vpm(torch.cat([item.tensors["patches"] for item in items]), shapes)
        return self.resampler(features, shapes).split([item.num_embeds for item in items])  # type: ignore[no-any-return]

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 (T,) -> (T, H)."""
        return self.model.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def forward(self, step: ForwardStep) -> Tensor:
        """Hidden states after the final norm, (T, H)."""
        return self.model(step.embeds, step.positions, step.kv, step.plan)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, V)."""
        return self._head[0](hidden)  # type: ignore[no-any-return]
