"""LLaVA: a vision tower, a two-layer projector, and a Llama-like decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opsin.api import Activation, BuildContext, ForwardStep, MappedMedia, Modality
from opsin.layers import (
    Decoder,
    Linear,
    RotaryTable,
    Table,
    VisionTransformer,
    flatten_patches,
    kv_geometry,
    output_head,
)
from opsin_models_llava.features import Features
from opsin_models_llava.grid import Grid
from opsin_models_llava.text import decoder_config, rope_theta

PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "vision_tower.",
    "model.language_model.": "model.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}
"""Checkpoint key -> name here: first those of the hub, then those that transformers 5 uses."""

NOT_READ = re.compile(
    r"vision_tower\.(post_layernorm|head)\.|vision_tower\.embeddings\.position_ids$"
    r"|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$"
)
"""Beyond the states that are read (SigLIP's pooling head, the norm after the last layer), or constants."""


class Projector(nn.Module):
    """Tower width -> language model width, in two layers."""

    def __init__(
        self, context: BuildContext, width: int, hidden: int, *, activation: Activation, bias: bool
    ) -> None:
        super().__init__()
        self.linear_1 = Linear(context, width, hidden, bias=bias, activation=activation)
        self.linear_2 = Linear(context, hidden, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., H)."""
        y: Tensor = self.linear_2(self.linear_1(x))
        return y


class Llava(nn.Module):
    """LLaVA-1.5; see `opsin.api.Model`."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        config = context.config
        self.features = Features.from_config(config)
        decoder = decoder_config(config)
        self.hidden_size, self.vocab_size = decoder.hidden_size, decoder.vocab_size
        self.kv_geometry = kv_geometry(decoder, context.parallel.world_size)
        tower = self.features.tower
        self.vision_tower = VisionTransformer(
            context, tower, post_norm=False, read_after=self.features.read_after
        )
        activation = config.get("projector_hidden_act", "gelu")
        if activation not in ("gelu", "silu", "quick_gelu"):
            raise ValueError(f"projector_hidden_act is {activation!r}; expected gelu, silu or quick_gelu")
        self.multi_modal_projector = Projector(
            context,
            tower.hidden_size * len(self.features.read_after),
            decoder.hidden_size,
            activation=activation,
            bias=config.get("multimodal_projector_bias", True),
        )
        rotary = RotaryTable(decoder.head_size, rope_theta(config), device=context.device)
        head = output_head(context, decoder)
        self.model = Decoder(context, decoder, rotary=rotary, head=head)
        self._tied = decoder.tied
        # A tied head takes no weights of its own: kept out of the module tree.
        self._head = [head]
        if not decoder.tied:
            self.lm_head = head
        layers = range(tower.num_layers, self.features.num_stored_layers)
        self._unread_layers = tuple(f"vision_tower.encoder.layers.{number}." for number in layers)

    def weight_name(self, key: str) -> str | None:
        """See `opsin.api.Model.weight_name` and `PREFIXES`; layers above the one that is read are dropped."""
        old, new = next(((old, new) for old, new in PREFIXES.items() if key.startswith(old)), ("", ""))
        name = new + key.removeprefix(old)
        if name.startswith(self._unread_layers) or NOT_READ.match(name):
            return None
        return None if self._tied and name == "lm_head.weight" else name

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """See `opsin.api.Model.encode`; a picture is one square."""
        return [features[0] for features in self.square_features(items)]

    def square_features(self, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        """All squares of all items in one pass -> (squares, rows, H) of each item."""
        counts = [len(item.tensors["pixel_values"]) for item in items]
        squares = torch.cat([item.tensors["pixel_values"] for item in items])
        patches = flatten_patches(squares, self.features.tower.patch_size)
        states: Tensor = self.vision_tower(patches, [len(patches) // len(squares)] * len(squares))
        states = states.unflatten(0, (len(squares), -1))
        if self.features.drop_first:
            states = states[:, 1:]
        projected: Tensor = self.multi_modal_projector(states)
        parts: Sequence[Tensor] = projected.split(counts)
        return parts

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 (T,) -> (T, H)."""
        return self.model.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def forward(self, step: ForwardStep) -> Tensor:
        """Hidden states after the final norm, (T, H)."""
        return self.model(step.embeds, step.positions, step.kv, step.plan)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, V)."""
        return self._head[0](hidden)  # type: ignore[no-any-return]


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
