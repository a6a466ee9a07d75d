"""Phi-3-vision: picture embeddings in front of a Phi-3 decoder with two rotary scalings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opsin.api import BuildContext, MappedMedia, Modality
from opsin.layers import DecoderConfig, LanguageModel, RotaryTable
from opsin_models_phi3v.config import language_config, layer_counts
from opsin_models_phi3v.vision import VisionEmbedding

RENAMES = {
    r"^model\.vision_embed_tokens\.": "vision_embed_tokens.",
    r"\.img_processor\.vision_model\.": ".tower.",
}


class Phi3V(LanguageModel):
    """See `opsin.api.Model`."""

    def __init__(self, context: BuildContext) -> None:
        config = context.config
        text = language_config(config)
        decoder = DecoderConfig.from_config(text, fused=True)
        unread = "|".join(map(str, range(*layer_counts(config))))
        super().__init__(
            context,
            decoder,
            rotary=RotaryTable.from_config(text, decoder.head_size, context.device),
            renames=RENAMES,
            # What comes after the state that is read, and the token embeddings under a second name.
            unused=(rf"\.tower\.(encoder\.layers\.({unread})|post_layernorm)\.", r"\.wte\.weight$"),
        )
        self.vision_embed_tokens = VisionEmbedding(context, config, decoder.hidden_size)

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """All pictures of a step in one pass of the tower."""
        return self.vision_embed_tokens(items)
