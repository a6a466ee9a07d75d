"""Parts of a vision tower over patches of any number of frames of any shape, see `opsin.layers.Patching`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from opsin.api import BuildContext
from opsin.layers.linear import Linear
from opsin.layers.module import Module
from opsin.layers.patches import Grid
from opsin.layers.rotary import inverse_frequencies
from opsin.layers.vision import MLP, Rotary, normed, vision_norm


def in_blocks(values: Tensor, merge: int) -> Tensor:
    """(h, w, ...) of a frame's patches -> (h * w, ...) in the order (h / merge, w / merge, merge, merge)."""
    height, width, *rest = values.shape
    blocks = values.reshape(height // merge, merge, width // merge, merge, *rest)
    return blocks.transpose(1, 2).reshape(height * width, *rest)


@lru_cache(maxsize=256)
def frame_angles(height: int, width: int, merge: int, head_size: int) -> Tensor:
    """Rotary angles of every patch of a frame, float32 (height * width, head_size / 2), see `in_blocks`.

    The first half of the frequencies turns with the row, the second with the column (Wang et al. 2024,
    section 2.1).
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inverse = inverse_frequencies(head_size // 2, 10000.0)
    return torch.cat([in_blocks(i, merge).float().unsqueeze(1) * inverse for i in (rows, columns)], dim=-1)


def grid_rotary(grids: Sequence[Grid], merge: int, head_size: int) -> Rotary:
    """Cosines and sines of all patches of the grids, float32 (P, head_size) each, on the host."""
    frames = [frame_angles(h, w, merge, head_size).repeat(t, 1) for t, h, w in grids]
    angles = torch.cat(frames)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def frame_lengths(grids: Sequence[Grid]) -> list[int]:
    """Patches of each step of each grid: attention is within a step."""
    return [height * width for steps, height, width in grids for _ in range(steps)]


def patch_projection(
    context: BuildContext, width: int, *, patch_size: int, span: int, channels: int = 3, bias: bool = False
) -> Linear:
    """(P, channels * span * patch_size**2) -> (P, width).

    The checkpoint's convolution over ``span`` frames, whose stride is its kernel, is a linear layer.
    """
    kernel = (channels, span, patch_size, patch_size)
    return Linear(context, math.prod(kernel), width, bias=bias, stored_shape=(width, *kernel))


class PatchMerger(Module):
    """Each merge x merge block of patches, side by side, becomes one embedding.

    Args:
        context: build context.
        width: of the tower.
        merge: patches of a side.
        out: width of the embeddings.
        eps: of the norm.
        kind: of the norm.
        norm_merged: whether the norm is over a block instead of over each patch.
    """

    def __init__(
        self,
        context: BuildContext,
        width: int,
        merge: int,
        out: int,
        *,
        eps: float,
        kind: Literal["layer", "rms"] = "layer",
        norm_merged: bool = False,
    ) -> None:
        super().__init__()
        self._wide = width * merge**2
        self._norm_merged = norm_merged
        self.norm = vision_norm(context, self._wide if norm_merged else width, eps, kind)
        self.mlp = MLP(context, self._wide, self._wide, out, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """x (P, width) in the order of `in_blocks` -> (P / merge**2, out)."""
        if self._norm_merged:
            return self.mlp(normed(self.norm, x.reshape(-1, self._wide)))
        return self.mlp(normed(self.norm, x.contiguous()).view(-1, self._wide))
