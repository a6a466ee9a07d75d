"""Idefics3 and SmolVLM: SigLIP, patches put together by a linear layer, and a Llama decoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from opsin.api import BuildContext, MappedMedia, Modality
from opsin.layers import (
    DecoderConfig,
    LanguageModel,
    Linear,
    Module,
    RotaryTable,
    VisionTransformer,
    flatten_patches,
    pixel_shuffle,
)
from opsin_models_smolvlm.config import Vision, language_config

RENAMES = {
    r"^model\.text_model\.": "model.",
    r"^model\.(vision_model|connector)\.": r"\1.",
    r"^connector\.modality_projection\.proj\.": "connector.proj.",
}
"""The files' keys, which have been the same in all versions of transformers."""


@lru_cache(maxsize=256)
def fractional_positions(count: int, side: int) -> Tensor:
    """Rows (or columns) of a position table of ``side`` for ``count`` patches, int64 (count,).

    Patch i of n stands at the fraction i / n of the table (NaViT; Dehghani et al. 2023). In float32, as the
    published code has it, whose rounding decides where a fraction falls on a boundary (transformers,
    models/idefics3, ``Idefics3VisionEmbeddings``).
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    fractions = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
    return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)


class Connector(Module):
    """Squares of patches side by side, then one linear layer without a bias."""

    def __init__(self, context: BuildContext, vision: Vision, out: int) -> None:
        super().__init__()
        self._factor = vision.scale_factor
        width = vision.tower.hidden_size * vision.scale_factor**2
        self.proj = Linear(context, width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (squares, rows, columns, width) -> (squares, E, H)."""
        return self.proj(pixel_shuffle(x, self._factor).flatten(1, 2))


class SmolVLM(LanguageModel):
    """See `opsin.api.Model`. A picture is squares of one size; so is a video, one per frame."""

    def __init__(self, context: BuildContext) -> None:
        vision = Vision.from_config(context.config)
        text = language_config(context.config)
        decoder = DecoderConfig.from_config(text)
        super().__init__(
            context,
            decoder,
            rotary=RotaryTable.from_config(text, decoder.head_size, context.device),
            renames=RENAMES,
        )
        self._vision = vision
        self.vision_model = VisionTransformer(context, vision.tower, post_norm=True)
        self.connector = Connector(context, vision, self.hidden_size)

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """All squares of all items of a step in one pass."""
        counts = [len(item.tensors["pixel_values"]) for item in items]
        squares = torch.cat([item.tensors["pixel_values"] for item in items])
        side = squares.shape[-1] // self._vision.tower.patch_size
        patches = flatten_patches(squares, self._vision.tower.patch_size)
        along = fractional_positions(side, self._vision.side)
        positions = (along[:, None] * self._vision.side + along).flatten().repeat(len(squares))
        states = self.vision_model(patches, [side * side] * len(squares), positions)
        embeds = self.connector(states.unflatten(0, (len(squares), side, side)))
        return [part.flatten(0, 1) for part in embeds.split(counts)]
