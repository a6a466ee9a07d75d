"""The vision tower, a projector, and a decoder with multimodal rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opsin.api import BuildContext, ForwardStep, MappedMedia, Modality
from opsin.layers import (
    Decoder,
    DecoderConfig,
    Linear,
    RotaryTable,
    Table,
    VisionConfig,
    VisionTransformer,
    flatten_patches,
    kv_geometry,
    output_head,
)


class FamilyModel(nn.Module):
    """See `opsin.api.Model`."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        config = context.config
        tower = VisionConfig.from_config(config["vision_config"])
        decoder = DecoderConfig.from_config(config, qkv_bias=True)
        self.hidden_size, self.vocab_size = decoder.hidden_size, decoder.vocab_size
        self.kv_geometry = kv_geometry(decoder, context.parallel.world_size)
        rotary = RotaryTable(
            decoder.head_size,
            config.get("rope_theta", 1e4),
            sections=config["rope_scaling"]["mrope_section"],
            device=context.device,
        )
        self._tied, self._patch = decoder.tied, tower.patch_size
        self.vision_tower = VisionTransformer(context, tower, post_norm=True)
        self.projector = Linear(context, tower.hidden_size, decoder.hidden_size, bias=True, activation="gelu")
        self.image_end = Table(context, "image_end", (decoder.hidden_size,))
        head = output_head(context, decoder)
        self.model = Decoder(context, decoder, rotary=rotary, head=head)
        # A tied head takes no weights of its own: kept out of the module tree.
        self._head = [head]
        if not decoder.tied:
            self.lm_head = head

    def weight_name(self, key: str) -> str | None:
        if key == "lm_head.weight" and self._tied:
            return None
        return key.replace("model.language_model.", "model.")

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        pixels = torch.cat([item.tensors["pixel_values"] for item in items])
        patches = flatten_patches(pixels, self._patch)
        count = len(patches) // len(items)
        rows = self.projector(self.vision_tower(patches, [count] * len(items)))
        end = self.image_end()[None]
        return [torch.cat([part, end]) for part in rows.split(count)]

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(token_ids)

    def forward(self, step: ForwardStep) -> Tensor:
        return self.model(step.embeds, step.positions, step.kv, step.plan)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head[0](hidden)
