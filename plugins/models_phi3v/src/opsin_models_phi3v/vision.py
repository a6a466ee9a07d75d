"""Phi-3-vision's picture embeddings: CLIP over each crop, 2x2 patches merged, rows and views separated.

The order is that of the hub repository's ``image_embedding_phi3_v.py`` (``hd_feature_transform``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opsin.api import BuildContext, MappedMedia
from opsin.layers import MLP, Module, Table, VisionConfig, VisionTransformer, flatten_patches
from opsin_models_phi3v.inputs import CROP, crop_side

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": CROP,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""openai/clip-vit-large-patch14-336, which the published config.json names but does not describe."""

SETTINGS: Mapping[tuple[str, str], Any] = {
    ("embd_layer", "hd_transform_order"): "sub_glb",
    ("embd_layer", "projection_cls"): "mlp",
    ("embd_layer", "use_hd_transform"): True,
    ("embd_layer", "with_learnable_separator"): True,
    ("img_processor", "type_feature"): "patch",
}
"""Settings of config.json for which the hub's code has alternatives that no published checkpoint uses."""


def layer_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Layers of the tower up to the state that is read, and all that the checkpoint has."""
    stored = int({**CLIP, **config.get("vision_config", {})}["num_hidden_layers"])
    read = int(config.get("img_processor", {}).get("layer_idx", -2))
    return (stored + 1 + read if read < 0 else read), stored


class VisionEmbedding(Module):
    """The part of a checkpoint below ``model.vision_embed_tokens``.

    A ``vision_config`` in config.json overrides `CLIP`, e.g. for a smaller tower.

    Raises:
        ValueError: config.json asks for another arrangement, or a tower that does not fit the number of
            embeddings.
    """

    def __init__(self, context: BuildContext, config: Mapping[str, Any], out: int) -> None:
        super().__init__()
        for (section, name), supported in SETTINGS.items():
            asked = config.get(section, {}).get(name, supported)
            if asked != supported:
                raise ValueError(f"{section}.{name} is {asked!r}; only {supported!r} is supported")
        tower = VisionConfig.from_config(
            {**CLIP, **config.get("vision_config", {}), "model_type": CLIP["model_type"]},
            num_layers=layer_counts(config)[0],
        )
        self._patch = tower.patch_size
        self._patches = (CROP // self._patch) ** 2
        self._side = side = crop_side(config)
        if self._patches != (2 * side) ** 2 or tower.num_positions != self._patches + 1:
            raise ValueError(
                f"a tower with patches of {self._patch} pixels and {tower.num_positions} positions; expected "
                f"{2 * side}x{2 * side} patches of a {CROP}x{CROP} crop (img_processor.num_img_tokens is "
                f"{side**2}), and a class token"
            )
        wide = 4 * tower.hidden_size
        self.tower = VisionTransformer(context, tower, post_norm=False)
        self.img_projection = MLP(context, wide, out, out, "gelu", names=("0", "2"))
        self.newline = Table(context, "sub_GN", (1, 1, 1, wide))
        self.separator = Table(context, "glb_GN", (1, 1, wide))

    def forward(self, items: Sequence[MappedMedia]) -> list[Tensor]:
        """Crops of all items in one pass of the tower -> embeddings (E, out) of each."""
        views = [item.tensors["pixel_values"] for item in items]
        merged = self._merge(torch.cat(views)).split([len(view) for view in views])
        arranged = [self._arrange(view, item.geometry) for view, item in zip(merged, items)]
        return list(self.img_projection(torch.cat(arranged)).split([len(rows) for rows in arranged]))

    def _merge(self, crops: Tensor) -> Tensor:
        """float32 (C, 3, CROP, CROP) -> (C, side, side, 4 * width), 2x2 patches side by side."""
        states = self.tower(flatten_patches(crops, self._patch), [self._patches] * len(crops))
        patches = states.view(len(crops), -1, states.shape[-1])[:, 1:]  # without the class token
        blocks = patches.reshape(len(crops), self._side, 2, self._side, 2, -1).transpose(2, 3)
        return blocks.reshape(len(crops), self._side, self._side, -1)

    def _arrange(self, views: Tensor, grid: tuple[int, int]) -> Tensor:
        """(1 + rows * columns, side, side, wide), global view first -> (E, wide), global view last."""
        rows, columns = grid
        whole, crops = views[0], views[1:]
        picture = (
            crops.unflatten(0, (rows, columns))
            .transpose(1, 2)
            .reshape(rows * self._side, columns * self._side, views.shape[-1])
        )
        separator = self.separator().flatten(0, 1)
        return torch.cat([self._with_newlines(picture), separator, self._with_newlines(whole)])

    def _with_newlines(self, rows: Tensor) -> Tensor:
        """(rows, columns, wide) -> (rows * (columns + 1), wide)."""
        newlines = self.newline()[0].expand(len(rows), 1, -1)
        return torch.cat([rows, newlines], dim=1).flatten(0, 1)
