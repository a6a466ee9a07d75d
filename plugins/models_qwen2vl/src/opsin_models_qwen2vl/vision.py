"""Qwen2-VL's vision tower: 2-D rotary ViT over patches of any number and shape, and the 2x2 merger."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from opsin.api import BuildContext
from opsin.layers import MLP, LayerNorm, Linear, Module, VisionConfig, VisionEncoder, inverse_frequencies

Grid = tuple[int, int, int]
"""Frames, rows and columns, in patches."""

EPS = 1e-6


@lru_cache(maxsize=256)
def patch_angles(grid: Grid, merge: int, head_size: int) -> Tensor:
    """Rotary angles of every patch of a grid (t, h, w), float32 (t * h * w, head_size / 2).

    The first half of the frequencies turns with the row, the second with the column; patches come in the
    processor's order (t, h / merge, w / merge, merge, merge).
    """
    frames, height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")

    def in_blocks(index: Tensor) -> Tensor:
        blocks = index.reshape(height // merge, merge, width // merge, merge).transpose(1, 2)
        return blocks.flatten().repeat(frames).float().unsqueeze(1)

    inverse = inverse_frequencies(head_size // 2, 10000.0)
    return torch.cat((in_blocks(rows) * inverse, in_blocks(columns) * inverse), dim=-1)


class PatchMerger(Module):
    """Each 2x2 block of patches becomes one embedding of the language model."""

    def __init__(self, context: BuildContext, width: int, merge: int, out: int) -> None:
        super().__init__()
        self._wide = width * merge**2
        self.ln_q = LayerNorm(context, width, EPS)
        self.mlp = MLP(context, self._wide, self._wide, out, "gelu", names=("0", "2"))

    def forward(self, x: Tensor) -> Tensor:
        """x (P, width) -> (P / merge**2, out)."""
        return self.mlp(self.ln_q(x).view(-1, self._wide))


class VisionTower(Module):
    """Patches of any number of frames of any size, all in one flat batch; attention is within a frame."""

    def __init__(self, context: BuildContext, config: Mapping[str, Any], out: int) -> None:
        super().__init__()
        width, heads = config["embed_dim"], config["num_heads"]
        patch, channels = config.get("patch_size", 14), config.get("in_channels", config.get("in_chans", 3))
        # The checkpoint's Conv3d, whose stride is its kernel, is a linear layer over the flattened patch.
        kernel = (channels, config.get("temporal_patch_size", 2), patch, patch)
        self.patch_embed = Linear(
            context, math.prod(kernel), width, bias=False, stored_shape=(width, *kernel)
        )
        encoder = VisionConfig(
            hidden_size=width,
            intermediate_size=int(width * config.get("mlp_ratio", 4)),
            num_layers=config["depth"],
            num_heads=heads,
            patch_size=patch,
            num_positions=0,
            eps=EPS,
            activation="quick_gelu",
            fused=True,
            rotary=True,
        )
        self.encoder = VisionEncoder(context, encoder, [encoder.num_layers])
        self._merge = config.get("spatial_merge_size", 2)
        self._head_size = width // heads
        self._dtype, self._device = context.dtype, context.device
        self.merger = PatchMerger(context, width, self._merge, out)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """Patches (P, ...) of items one after another, and their grids -> embeddings (E, out) of each."""
        angles = torch.cat([patch_angles(grid, self._merge, self._head_size) for grid in grids])
        angles = torch.cat((angles, angles), dim=-1).to(self._device)
        lengths = [height * width for frames, height, width in grids for _ in range(frames)]
        x = self.patch_embed(patches.to(device=self._device, dtype=self._dtype))
        x = self.encoder(x, lengths, (angles.cos(), angles.sin()))
        return list(self.merger(x).split([math.prod(grid) // self._merge**2 for grid in grids]))
