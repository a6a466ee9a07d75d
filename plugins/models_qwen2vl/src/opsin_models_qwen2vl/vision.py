"""Qwen2-VL's vision tower: 2-D rotary ViT over patches of any number and shape, and the 2x2 merger."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from opsin.api import BuildContext, KernelQuery
from opsin.layers import LayerNorm, Linear, VisionMLP, dtype_name, inverse_frequencies

Grid = tuple[int, int, int]

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


class VisionAttention(nn.Module):
    """Attention among the patches of one frame."""

    def __init__(self, context: BuildContext, width: int, heads: int) -> None:
        super().__init__()
        self._head_size = width // heads
        self.qkv = Linear(context, width, 3 * width, bias=True)
        self.proj = Linear(context, width, width, bias=True)
        query = KernelQuery(
            op="dense_attention",
            dtype=dtype_name(context.dtype),
            num_heads=heads,
            num_kv_heads=heads,
            head_size=self._head_size,
        )
        self._attend = context.kernels.dense_attention(query)
        self._rotary = context.kernels.rotary(
            KernelQuery(
                op="rotary",
                dtype=query.dtype,
                num_heads=heads,
                num_kv_heads=heads,
                head_size=self._head_size,
            )
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        """x (P, width), cos and sin (P, D), ``lengths`` patches of each frame -> (P, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self._head_size)).unbind(1)
        q, k = self._rotary(q, k, cos, sin)
        attended = self._attend(q, k, v, lengths, None, 1 / math.sqrt(self._head_size))
        projected: Tensor = self.proj(attended.flatten(1))
        return projected


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, context: BuildContext, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(context, width, EPS)
        self.attn = VisionAttention(context, width, heads)
        self.norm2 = LayerNorm(context, width, EPS)
        self.mlp = VisionMLP(context, width, hidden, "quick_gelu")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        """x (P, width) -> (P, width)."""
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class PatchMerger(nn.Module):
    """Each 2x2 block of patches becomes one embedding of the language model."""

    def __init__(self, context: BuildContext, width: int, merge: int, out: int) -> None:
        super().__init__()
        wide = width * merge**2
        self._wide = wide
        self.ln_q = LayerNorm(context, width, EPS)
        self.mlp = nn.ModuleDict(
            {
                "0": Linear(context, wide, wide, bias=True, activation="gelu"),
                "2": Linear(context, wide, out, bias=True),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (P, width) -> (P / merge**2, out)."""
        y: Tensor = self.mlp["2"](self.mlp["0"](self.ln_q(x).view(-1, self._wide)))
        return y


class PatchEmbed(nn.Module):
    """The checkpoint's Conv3d whose stride is its kernel: a linear layer over the flattened patch."""

    def __init__(self, context: BuildContext, kernel: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.proj = Linear(context, math.prod(kernel), width, bias=False, stored_shape=(width, *kernel))

    def forward(self, patches: Tensor) -> Tensor:
        """(P, channels * frames * patch**2) -> (P, width)."""
        y: Tensor = self.proj(patches)
        return y


class VisionTower(nn.Module):
    """Patches of any number of frames of any size, all in one flat batch."""

    def __init__(self, context: BuildContext, config: Mapping[str, Any], out: int) -> None:
        super().__init__()
        width, heads = config["embed_dim"], config["num_heads"]
        patch = config.get("patch_size", 14)
        kernel = (config.get("in_channels", config.get("in_chans", 3)), config.get("temporal_patch_size", 2))
        self._merge = config.get("spatial_merge_size", 2)
        self._head_size = width // heads
        self._dtype, self._device = context.dtype, context.device
        self.patch_embed = PatchEmbed(context, (*kernel, patch, patch), width)
        hidden = int(width * config.get("mlp_ratio", 4))
        self.blocks = nn.ModuleList(
            VisionBlock(context, width, heads, hidden) for _ in range(config["depth"])
        )
        self.merger = PatchMerger(context, width, self._merge, out)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """Patches (P, ...) of items one after another, and their grids -> embeddings (E, out) of each."""
        angles = torch.cat([patch_angles(grid, self._merge, self._head_size) for grid in grids])
        angles = torch.cat((angles, angles), dim=-1).to(self._device)
        cos, sin = angles.cos(), angles.sin()
        lengths = [height * width for frames, height, width in grids for _ in range(frames)]
        x = self.patch_embed(patches.to(device=self._device, dtype=self._dtype))
        for block in self.blocks:
            x = block(x, cos, sin, lengths)
        counts = [math.prod(grid) // self._merge**2 for grid in grids]
        return list(self.merger(x).split(counts))
