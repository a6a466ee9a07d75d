"""InternVL: InternViT over tiles, squares of patches put together by a projector, and a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsin.api import BuildContext, MappedMedia, Modality
from opsin.layers import (
    LanguageModel,
    LayerNorm,
    Linear,
    Module,
    RotaryTable,
    Table,
    VisionConfig,
    VisionEncoder,
    flatten_patches,
    pixel_shuffle,
)
from opsin_models_internvl.config import Vision, decoder_config, language_config

PROJECTOR_EPS = 1e-5
"""Of the projector's norm: torch's default."""

RENAMES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
    r"^model\.(vision_tower|multi_modal_projector)\.": r"\1.",
    r"^vision_tower\.encoder\.layer\.": "vision_tower.encoder.layers.",
    r"^(vision_tower\..*)\.attention\.projection_layer\.": r"\1.self_attn.out_proj.",
    r"^(vision_tower\..*)\.attention\.": r"\1.self_attn.",
    r"^(vision_tower\..*)\.layernorm_before\.": r"\1.layer_norm1.",
    r"^(vision_tower\..*)\.layernorm_after\.": r"\1.layer_norm2.",
    r"\.patch_embeddings\.projection\.": ".projection.",
}
"""The hub's keys, and those of transformers since 4.53, which begin with ``model.``."""


class Embeddings(Module):
    """Patches behind a class token, all with their positions."""

    def __init__(self, context: BuildContext, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.projection = Linear(
            context,
            config.num_channels * patch**2,
            width,
            bias=True,
            stored_shape=(width, config.num_channels, patch, patch),
            num_sums=config.num_channels,
        )
        self.first = Table(context, "cls_token", (1, 1, width))
        self.positions = Table(context, "position_embeddings", (1, config.num_positions, width))

    def forward(self, patches: Tensor, count: int) -> Tensor:
        """Patches of ``count`` tiles (tiles * P, 3 * patch**2) -> (tiles * (1 + P), width)."""
        x = self.projection(patches).unflatten(0, (count, -1))
        x = torch.cat([self.first().expand(count, 1, -1), x], dim=1)
        return (x + self.positions()).flatten(0, 1)


class Tower(Module):
    """InternViT, read after the last layer that is built."""

    def __init__(self, context: BuildContext, vision: Vision) -> None:
        super().__init__()
        config = vision.tower
        self.embeddings = Embeddings(context, config)
        self.encoder = VisionEncoder(context, config, [config.num_layers])
        self.layernorm = LayerNorm(context, config.hidden_size, config.eps) if vision.has_norm else None
        self._patch = config.patch_size
        self._dtype, self._device = context.dtype, context.device

    def forward(self, tiles: Tensor) -> Tensor:
        """tiles (tiles, 3, side, side) -> states of the patches (tiles, P, width)."""
        count = len(tiles)
        patches = flatten_patches(tiles, self._patch).to(device=self._device, dtype=self._dtype)
        x = self.embeddings(patches, count)
        x = self.encoder(x, [len(x) // count] * count)
        if self.layernorm is not None:
            x = self.layernorm(x)
        return x.view(count, -1, x.shape[-1])[:, 1:]


class Projector(Module):
    """A norm and two linear layers."""

    def __init__(self, context: BuildContext, vision: Vision, out: int) -> None:
        super().__init__()
        width = vision.tower.hidden_size * vision.factor**2
        self.layer_norm = LayerNorm(context, width, PROJECTOR_EPS)
        self.linear_1 = Linear(context, width, out, bias=True, activation=vision.projector)
        self.linear_2 = Linear(context, out, out, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., out)."""
        return self.linear_2(self.linear_1(self.layer_norm(x)))


class InternVL(LanguageModel):
    """See `opsin.api.Model`. A picture is tiles of one size; so is a video, one per frame."""

    def __init__(self, context: BuildContext) -> None:
        vision = Vision.from_config(context.config)
        text = language_config(context.config)
        decoder = decoder_config(text)
        unread = "|".join(map(str, range(vision.tower.num_layers, vision.num_stored_layers))) or "none"
        norm = "" if vision.has_norm else r"|layernorm\."
        super().__init__(
            context,
            decoder,
            rotary=RotaryTable.from_config(text, decoder.head_size, context.device),
            renames=RENAMES,
            unused=(rf"^vision_tower\.(encoder\.layers\.({unread})\.|embeddings\.mask_token{norm})",),
        )
        self._vision = vision
        self.vision_tower = Tower(context, vision)
        self.multi_modal_projector = Projector(context, vision, self.hidden_size)

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """All tiles of all items of a step in one pass."""
        counts = [len(item.tensors["pixel_values"]) for item in items]
        states = self.vision_tower(torch.cat([item.tensors["pixel_values"] for item in items]))
        side = self._vision.side
        squares = pixel_shuffle(states.unflatten(1, (side, side)), self._vision.factor).flatten(1, 2)
        return [part.flatten(0, 1) for part in self.multi_modal_projector(squares).split(counts)]
