"""Qwen2-VL's vision tower: 2-D rotary ViT over patches of any number and shape, and the 2x2 merger."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from opsin.api import BuildContext
from opsin.layers import (
    Grid,
    Module,
    PatchMerger,
    VisionConfig,
    VisionEncoder,
    activation,
    frame_lengths,
    grid_rotary,
    patch_projection,
)

EPS = 1e-6


class VisionTower(Module):
    """Patches of any number of frames of any size, all in one flat batch; attention is within a frame."""

    def __init__(self, context: BuildContext, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, heads = config["embed_dim"], config["num_heads"]
        if heads < 1 or width % heads or width // heads % 4:
            raise ValueError(
                f"vision_config.embed_dim is {width} and num_heads {heads}; expected heads of a multiple of 4"
            )
        self.patch_embed = patch_projection(
            context,
            width,
            patch_size=config["patch_size"],
            span=config["temporal_patch_size"],
            channels=config["in_channels"],
        )
        encoder = VisionConfig(
            hidden_size=width,
            intermediate_size=int(width * config["mlp_ratio"]),
            num_layers=config["depth"],
            num_heads=heads,
            patch_size=config["patch_size"],
            num_positions=0,
            eps=EPS,
            activation=activation(config["hidden_act"], "vision_config.hidden_act"),
            fused=True,
            rotary=True,
        )
        self.encoder = VisionEncoder(context, encoder, [encoder.num_layers])
        self._merge = config["spatial_merge_size"]
        self._head_size = width // heads
        self._dtype, self._device = context.dtype, context.device
        self.merger = PatchMerger(context, width, self._merge, config["hidden_size"], eps=EPS)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """Patches (P, ...) of items one after another, and their grids -> embeddings (E, out) of each."""
        cos, sin = (part.to(self._device) for part in grid_rotary(grids, self._merge, self._head_size))
        x = self.patch_embed(patches.to(device=self._device, dtype=self._dtype))
        x = self.encoder(x, frame_lengths(grids), (cos, sin))
        return list(self.merger(x).split([math.prod(grid) // self._merge**2 for grid in grids]))
