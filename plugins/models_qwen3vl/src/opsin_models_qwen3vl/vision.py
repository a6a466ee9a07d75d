"""Qwen3-VL's vision tower: learned positions fitted to the frame, and mergers after several layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from opsin.api import BuildContext
from opsin.layers import (
    Grid,
    Module,
    PatchMerger,
    Table,
    VisionConfig,
    VisionEncoder,
    activation,
    frame_lengths,
    grid_rotary,
    in_blocks,
    patch_projection,
)

EPS = 1e-6


@lru_cache(maxsize=64)
def fitted_positions(height: int, width: int, side: int, merge: int) -> tuple[Tensor, Tensor]:
    """Which rows of a table of side x side positions a frame's patches mix, and how much of each (bilinear).

    The table's corners are the frame's (transformers, models/qwen3_vl: ``align_corners``), in float32.

    Returns:
        int64 and float32, (4, height * width) each, patches in the order of `opsin.layers.in_blocks`.
    """

    def axis(count: int) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.arange(count).float() * (side - 1) / max(count - 1, 1)
        below = places.floor().long()
        return below, (below + 1).clamp(max=side - 1), places - below

    top, bottom, down = axis(height)
    left, right, across = axis(width)
    rows, weights = [], []
    for row, tall in ((top, 1 - down), (bottom, down)):
        for column, wide in ((left, 1 - across), (right, across)):
            rows.append(in_blocks(row.unsqueeze(1) * side + column, merge))
            weights.append(in_blocks(tall.unsqueeze(1) * wide, merge))
    return torch.stack(rows), torch.stack(weights)


class VisionTower(Module):
    """Patches of any number of frames of any size, all in one flat batch; attention is within a frame."""

    def __init__(self, context: BuildContext, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, heads = config["hidden_size"], config["num_heads"]
        if heads < 1 or width % heads or width // heads % 4:
            raise ValueError(
                f"vision_config.hidden_size is {width}, num_heads {heads}; expected heads of a multiple of 4"
            )
        rows, deep = config["num_position_embeddings"], config["deepstack_visual_indexes"]
        self._side = math.isqrt(rows)
        self._merge = config["spatial_merge_size"]
        self.patch_embed = patch_projection(
            context,
            width,
            patch_size=config["patch_size"],
            span=config["temporal_patch_size"],
            channels=config["in_channels"],
            bias=True,
        )
        self.pos_embed = Table(context, "pos_embed.weight", (rows, width))
        encoder = VisionConfig(
            hidden_size=width,
            intermediate_size=config["intermediate_size"],
            num_layers=config["depth"],
            num_heads=heads,
            patch_size=config["patch_size"],
            num_positions=rows,
            eps=EPS,
            activation=activation(config["hidden_act"], "vision_config.hidden_act"),
            fused=True,
            rotary=True,
        )
        self.encoder = VisionEncoder(context, encoder, [layer + 1 for layer in deep] + [encoder.num_layers])
        self._head_size = width // heads
        self._dtype, self._device = context.dtype, context.device
        out = config["out_hidden_size"]
        self.merger = PatchMerger(context, width, self._merge, out, eps=EPS)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(context, width, self._merge, out, eps=EPS, norm_merged=True) for _ in deep
        )
        # The decoder's first layer gets what the earliest of these layers gives.
        self._by_depth = sorted(range(len(deep)), key=deep.__getitem__)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """Patches (P, ...) of items one after another, and their grids -> (E, (1 + deep) * out) of each.

        Beside an embedding stand the features that are added after the decoder's first layers.
        """
        cos, sin = (part.to(self._device) for part in grid_rotary(grids, self._merge, self._head_size))
        x = self.patch_embed(patches.to(device=self._device, dtype=self._dtype)) + self._positions(grids)
        *deep, last = self.encoder(x, frame_lengths(grids), (cos, sin)).chunk(
            1 + len(self.deepstack_merger_list), dim=-1
        )
        columns = [self.merger(last)]
        columns += [self.deepstack_merger_list[number](deep[number]) for number in self._by_depth]
        rows = torch.cat(columns, dim=-1)
        return list(rows.split([math.prod(grid) // self._merge**2 for grid in grids]))

    def _positions(self, grids: Sequence[Grid]) -> Tensor:
        """(P, width)."""
        table = self.pos_embed()
        parts = []
        for steps, height, width in grids:
            rows, weights = (
                part.to(self._device) for part in fitted_positions(height, width, self._side, self._merge)
            )
            frame = torch.zeros(height * width, table.shape[1], dtype=torch.float32, device=self._device)
            for row, weight in zip(rows, weights):
                frame += table.index_select(0, row) * weight.unsqueeze(1)
            parts.append(frame.to(self._dtype).repeat(steps, 1))
        return torch.cat(parts)
