"""LLaVA: a vision tower, a two-layer projector, and a Llama-like decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsin.api import BuildContext, MappedMedia, Modality
from opsin.layers import (
    MLP,
    DecoderConfig,
    LanguageModel,
    RotaryTable,
    Table,
    VisionTransformer,
    flatten_patches,
)
from opsin_models_llava.features import Features
from opsin_models_llava.grid import Grid
from opsin_models_llava.text import language_config

RENAMES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
    r"^model\.(vision_tower|multi_modal_projector|image_newline)": r"\1",
    r"^vision_tower\.vision_model\.": "vision_tower.",
}
"""The hub's keys, and those of transformers 5, which all begin with ``model.``."""


class Llava(LanguageModel):
    """LLaVA-1.5; see `opsin.api.Model`."""

    def __init__(self, context: BuildContext) -> None:
        config = context.config
        features = Features.from_config(config)
        text = language_config(config)
        decoder = DecoderConfig.from_config(text, qkv_bias=text["model_type"] == "qwen2")
        tower = features.tower
        unread = "|".join(map(str, range(tower.num_layers, features.num_stored_layers)))
        super().__init__(
            context,
            decoder,
            rotary=RotaryTable.from_config(text, decoder.head_size, context.device),
            renames=RENAMES,
            # Beyond the states that are read: layers, the norm after the last one, SigLIP's pooling head.
            unused=(rf"^vision_tower\.(encoder\.layers\.({unread})|post_layernorm|head)\.",),
        )
        self.features = features
        self.vision_tower = VisionTransformer(context, tower, post_norm=False, read_after=features.read_after)
        activation = config.get("projector_hidden_act", "gelu")
        if activation not in ("gelu", "silu", "quick_gelu"):
            raise ValueError(f"projector_hidden_act is {activation!r}; expected gelu, silu or quick_gelu")
        self.multi_modal_projector = MLP(
            context,
            tower.hidden_size * len(features.read_after),
            decoder.hidden_size,
            decoder.hidden_size,
            activation,
            bias=config.get("multimodal_projector_bias", True),
            names=("linear_1", "linear_2"),
        )

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """See `opsin.api.Model.encode`; a picture is one square."""
        return [features[0] for features in self.square_features(items)]

    def square_features(self, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """All squares of all items in one pass -> (squares, rows, H) of each item."""
        counts = [len(item.tensors["pixel_values"]) for item in items]
        squares = torch.cat([item.tensors["pixel_values"] for item in items])
        patches = flatten_patches(squares, self.features.tower.patch_size)
        states = self.vision_tower(patches, [len(patches) // len(squares)] * len(squares))
        states = states.unflatten(0, (len(squares), -1))[:, int(self.features.drop_first) :]
        return list(self.multi_modal_projector(states).split(counts))


class LlavaNext(Llava):
    """LLaVA-NeXT: the features of the whole picture, then those of the grid of crops, row by row."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__(context)
        side, num_rows = self.features.side, self.features.num_rows
        if num_rows != side**2:
            raise ValueError(
                f"the tower gives {num_rows} features of a picture, a grid needs {side}x{side}: "
                "vision_feature_select_strategy does not fit the tower's class token"
            )
        self.image_newline = Table(context, "image_newline", (self.hidden_size,))

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """See `opsin.api.Model.encode`; a picture is a square and a grid of squares."""
        features, newline = self.square_features(items), self.image_newline()
        return [packed(part, item.geometry, newline) for part, item in zip(features, items, strict=True)]


def packed(features: Tensor, grid: Grid, newline: Tensor) -> Tensor:
    """(1 + crops, side**2, H) -> (E, H): the first square, then the grid without padding, a newline per row.

    Source: transformers, models/llava_next, ``pack_image_features``.
    """
    base, crops = features[0], features[1:]
    wide = crops.unflatten(1, (grid.side, grid.side)).unflatten(0, (grid.rows, grid.columns))
    whole = wide.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    seen = whole[grid.top : grid.top + grid.height, grid.left : grid.left + grid.width]
    lines = torch.cat([seen, newline.expand(grid.height, 1, -1)], dim=1)
    return torch.cat([base, lines.flatten(0, 1)])
