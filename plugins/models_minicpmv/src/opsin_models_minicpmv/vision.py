"""The vision towers: SigLIP over slices of any shape (2.5, 2.6), and timm's SigLIP (2.0)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import BuildContext
from opsin.layers import LayerNorm, Linear, Module, Table, VisionConfig, VisionEncoder, VisionTransformer

Shape = tuple[int, int]
"""(rows, columns) of patches of one slice."""


@lru_cache(maxsize=1024)
def bucketised(count: int, side: int) -> Tensor:
    """Rows (or columns) of a position table of ``side`` for ``count`` patches, int64 (count,).

    Patch i of n stands at the fraction i / n of the table. In float32, as the published code has it: its
    rounding decides where a fraction falls on a boundary (openbmb/MiniCPM-V-2_6, modeling_navit_siglip.py).
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    step = float(1 / torch.tensor(count))
    return torch.bucketize(torch.arange(0, 1 - 1e-6, step), boundaries, right=True)


def position_rows(shape: Shape, side: int, *, flat: bool) -> Tensor:
    """Row of the position table of each patch, int64 (rows * columns,).

    ``flat``: the published 2.5 passes all patches of a slice to its tower as a single row.
    """
    rows, columns = (1, shape[0] * shape[1]) if flat else shape
    return (bucketised(rows, side)[:, None] * side + bucketised(columns, side)).flatten()


class SliceTower(Module):
    """SigLIP with positions by fractions of the slice; all slices in one flat batch."""

    def __init__(self, context: BuildContext, config: VisionConfig, *, flat: bool) -> None:
        super().__init__()
        self.tower = VisionTransformer(context, config, post_norm=True)
        self._side, self._flat = round(config.num_positions**0.5), flat

    def forward(self, patches: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """patches (P, 3 * patch**2) of slices one after another -> (P, width)."""
        positions = torch.cat([position_rows(shape, self._side, flat=self._flat) for shape in shapes])
        lengths = [rows * columns for rows, columns in shapes]
        return self.tower(patches, lengths, positions)


class ResampledTower(Module):
    """timm's ViT with a dynamic image size: the position table is resampled to the slice's shape."""

    def __init__(self, context: BuildContext, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = Linear(
            context,
            config.num_channels * patch**2,
            width,
            bias=True,
            stored_shape=(width, config.num_channels, patch, patch),
        )
        self.position = Table(context, "pos_embed", (1, config.num_positions, width))
        self.encoder = VisionEncoder(context, config, [config.num_layers])
        self.norm = LayerNorm(context, width, config.eps)
        self._side = round(config.num_positions**0.5)
        self._dtype, self._device = context.dtype, context.device
        self._resampled = lru_cache(maxsize=16)(self._resample)

    def _resample(self, shape: Shape) -> Tensor:
        """Positions of a slice, (rows * columns, width), as timm's ``resample_abs_pos_embed`` has them."""
        table = self.position()[0]
        if shape == (self._side, self._side):
            return table
        # On the host: once per shape, and few accelerators have this interpolation.
        grid = table.to("cpu", torch.float32).view(1, self._side, self._side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=shape, mode="bicubic", antialias=True)
        return grid[0].flatten(1).t().to(self._device, self._dtype)

    def forward(self, patches: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """patches (P, 3 * patch**2) of slices one after another -> (P, width)."""
        x = self.patch_embed(patches.to(device=self._device, dtype=self._dtype))
        x = x + torch.cat([self._resampled(shape) for shape in shapes])
        x = self.encoder(x, [rows * columns for rows, columns in shapes])
        return self.norm(x)
