"""Qwen2-VL: the vision tower in front of a Qwen2 decoder with multimodal rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opsin.api import BuildContext, ForwardStep, MappedMedia, Modality
from opsin.layers import Decoder, DecoderConfig, RotaryTable, kv_geometry, output_head
from opsin_models_qwen2vl.vision import VisionTower


class Qwen2VL(nn.Module):
    """See `opsin.api.Model`. Layouts of 2B (tied), 7B and 72B (untied)."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        config = context.config
        decoder = DecoderConfig.from_config(config, qkv_bias=True)
        self.hidden_size, self.vocab_size = decoder.hidden_size, decoder.vocab_size
        self.kv_geometry = kv_geometry(decoder, context.parallel.world_size)
        rotary = RotaryTable(
            decoder.head_size,
            config.get("rope_theta", 1e6),
            sections=config["rope_scaling"]["mrope_section"],
            device=context.device,
        )
        self._tied = decoder.tied
        self.visual = VisionTower(context, config["vision_config"], decoder.hidden_size)
        head = output_head(context, decoder)
        self.model = Decoder(context, decoder, rotary=rotary, head=head)
        # A tied head takes no weights of its own: kept out of the module tree.
        self._head = [head]
        if not decoder.tied:
            self.lm_head = head

    def weight_name(self, key: str) -> str | None:
        """The hub's keys as they are; the nested ones of newer exports are folded back."""
        if key == "lm_head.weight" and self._tied:
            return None
        for nested, flat in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            if key.startswith(nested):
                return flat + key.removeprefix(nested)
        return key

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """All items of a step in one pass; images and videos differ only in their grids."""
        patches = torch.cat([item.tensors["pixel_values"] for item in items])
        return self.visual(patches, [item.geometry for item in items])  # type: ignore[no-any-return]

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 (T,) -> (T, H)."""
        return self.model.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def forward(self, step: ForwardStep) -> Tensor:
        """Hidden states after the final norm, (T, H)."""
        return self.model(step.embeds, step.positions, step.kv, step.plan)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, V)."""
        return self._head[0](hidden)  # type: ignore[no-any-return]
