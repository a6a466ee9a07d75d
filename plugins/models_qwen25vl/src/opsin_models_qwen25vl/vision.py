"""Qwen2.5-VL's vision tower: most layers attend within windows of a frame, some to all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
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


@lru_cache(maxsize=256)
def frame_windows(rows: int, columns: int, side: int) -> tuple[Tensor, tuple[int, ...]]:
    """A frame's merged patches, window by window.

    Returns:
        int64 (rows * columns,), their indices in row-major order; and how many are in each window.
    """
    index = torch.arange(rows * columns).view(rows, columns)
    windows = [part.flatten() for band in index.split(side, dim=0) for part in band.split(side, dim=1)]
    return torch.cat(windows), tuple(map(len, windows))


class VisionTower(Module):
    """Patches of any number of frames of any size, all in one flat batch."""

    def __init__(self, context: BuildContext, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, heads, depth = config["hidden_size"], config["num_heads"], config["depth"]
        if heads < 1 or width % heads or width // heads % 4:
            raise ValueError(
                f"vision_config.hidden_size is {width}, num_heads {heads}; expected heads of a multiple of 4"
            )
        full = config["fullatt_block_indexes"]
        if not all(isinstance(layer, int) and layer >= 0 for layer in full):
            raise ValueError(
                f"vision_config.fullatt_block_indexes is {full!r:.80}; expected numbers of layers"
            )
        self._merge = config["spatial_merge_size"]
        self._window = config["window_size"] // self._merge // config["patch_size"]
        if self._window < 1:
            raise ValueError(
                f"vision_config.window_size is {config['window_size']}; expected at least a merged patch of "
                f"{self._merge * config['patch_size']} pixels"
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
            intermediate_size=config["intermediate_size"],
            num_layers=depth,
            num_heads=heads,
            patch_size=config["patch_size"],
            num_positions=0,
            eps=EPS,
            activation=activation(config["hidden_act"], "vision_config.hidden_act"),
            fused=True,
            rotary=True,
            norm="rms",
            gated=True,
            full_layers=tuple(layer for layer in full if layer < depth),
        )
        self.encoder = VisionEncoder(context, encoder, [depth])
        self._head_size = width // heads
        self._dtype, self._device = context.dtype, context.device
        self.merger = PatchMerger(context, width, self._merge, config["out_hidden_size"], eps=EPS, kind="rms")

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """Patches (P, ...) of items one after another, and their grids -> embeddings (E, out) of each."""
        area = self._merge**2
        order, windows = self._windows(grids)

        def by_window(x: Tensor) -> Tensor:
            merged = x.view(-1, area * x.shape[1])
            return merged.index_select(0, order.to(x.device)).view(x.shape)

        rotary = grid_rotary(grids, self._merge, self._head_size)
        cos, sin = (by_window(part).to(self._device) for part in rotary)
        x = by_window(self.patch_embed(patches.to(device=self._device, dtype=self._dtype)))
        x = self.encoder(x, frame_lengths(grids), (cos, sin), windows)
        embeds = self.merger(x).index_select(0, order.argsort().to(self._device))
        return list(embeds.split([math.prod(grid) // area for grid in grids]))

    def _windows(self, grids: Sequence[Grid]) -> tuple[Tensor, list[int]]:
        """The order of merged patches, int64 (E,), and the patches in each window."""
        orders: list[Tensor] = []
        lengths: list[int] = []
        first = 0
        for steps, height, width in grids:
            rows, columns = height // self._merge, width // self._merge
            order, counts = frame_windows(rows, columns, self._window)
            for _ in range(steps):
                orders.append(order + first)
                lengths += [count * self._merge**2 for count in counts]
                first += len(order)
        return torch.cat(orders), lengths
