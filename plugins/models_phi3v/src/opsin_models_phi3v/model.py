"""Phi-3-vision: picture embeddings in front of a Phi-3 decoder with two rotary scalings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from opsin.api import BuildContext, ForwardStep, MappedMedia, Modality
from opsin.layers import Decoder, DecoderConfig, kv_geometry, output_head
from opsin_models_phi3v.positions import rotary_table
from opsin_models_phi3v.vision import VisionEmbedding, used_layers

VISION = "model.vision_embed_tokens."

UNUSED = ("wte.weight", "img_processor.vision_model.post_layernorm.", ".position_ids")
"""Of what is below `VISION`: the token embeddings under a second name, what comes after the state that is
read, and a count from 0."""


class Phi3V(nn.Module):
    """See `opsin.api.Model`."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        config = context.config
        decoder = DecoderConfig.from_config(config, fused=True)
        self.hidden_size, self.vocab_size = decoder.hidden_size, decoder.vocab_size
        self.kv_geometry = kv_geometry(decoder, context.parallel.world_size)
        self._tied = decoder.tied
        self._used_layers = used_layers(config)
        self.vision_embed_tokens = VisionEmbedding(context, config, decoder.hidden_size)
        head = output_head(context, decoder)
        rotary = rotary_table(config, decoder.head_size, context.device)
        self.model = Decoder(context, decoder, rotary=rotary, head=head)
        # A tied head takes no weights of its own: kept out of the module tree.
        self._head = [head]
        if not decoder.tied:
            self.lm_head = head

    def weight_name(self, key: str) -> str | None:
        """The hub's keys, those of the pictures moved up beside the decoder's."""
        if key == "lm_head.weight" and self._tied:
            return None
        if not key.startswith(VISION):
            return key
        name = key.removeprefix(VISION)
        layer = re.match(r"img_processor\.vision_model\.encoder\.layers\.(\d+)\.", name)
        beyond = layer is not None and int(layer[1]) >= self._used_layers
        if beyond or any(part in name for part in UNUSED):
            return None
        return f"vision_embed_tokens.{name}"

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """All pictures of a step in one pass of the tower."""
        return self.vision_embed_tokens(items)  # type: ignore[no-any-return]

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 (T,) -> (T, H)."""
        return self.model.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def forward(self, step: ForwardStep) -> Tensor:
        """Hidden states after the final norm, (T, H)."""
        return self.model(step.embeds, step.positions, step.kv, step.plan)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, V)."""
        return self._head[0](hidden)  # type: ignore[no-any-return]
