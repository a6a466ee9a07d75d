"""The resampler: a fixed number of learned queries read each slice by cross attention.

As published (openbmb/MiniCPM-V-2_6, resampler.py; the idea is Qwen-VL's, Bai et al. 2023, section 2.1). Keys
carry two-dimensional sine-cosine positions, values do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from opsin.api import BuildContext, KernelQuery
from opsin.layers import Layer, LayerNorm, Linear, Module, Slot, Table, dtype_name
from opsin_models_minicpmv.vision import Shape

EPS = 1e-6
HEAD_SIZE = 128


@lru_cache(maxsize=4)
def sincos(length: int, width: int) -> Tensor:
    """Sines and cosines of positions 0 .. length - 1, float32 (length, width) (Vaswani et al. 2017, 3.5)."""
    frequencies = 1 / 10000 ** (torch.arange(width // 2, dtype=torch.float32) / (width / 2))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def positions_2d(shapes: Sequence[Shape], width: int) -> Tensor:
    """Positions of the patches of several slices, float32 (P, width): the column's half, then the row's.

    (He et al. 2022, MAE: its grid has the width first.)
    """
    sides = [side for shape in shapes for side in shape]
    # Lengths are powers of two, so that the table is recomputed only a few times.
    table = sincos(max(64, 1 << (max(sides) - 1).bit_length()), width // 2)
    rows = torch.cat([torch.arange(rows).repeat_interleave(columns) for rows, columns in shapes])
    columns = torch.cat([torch.arange(columns).repeat(rows) for rows, columns in shapes])
    return torch.cat((table[columns], table[rows]), dim=-1)


class OutProjection(Linear):
    """x @ proj: a matrix stored the other way round than a linear layer's, under a name of its own."""

    def slots(self) -> Iterator[Slot]:
        """The matrix, among the keys of the resampler."""
        [slot] = super().slots()
        yield Slot("proj", slot.shape, lambda matrix: slot.put(matrix.t()), beside=True)


class Part(Linear):
    """One of several layers whose tensors are stored as one: it gets them from `CrossAttention`."""

    def slots(self) -> Iterator[Slot]:
        """None of its own."""
        return iter(())


class CrossAttention(Layer):
    """Queries of each slice over its patches, stored as torch's MultiheadAttention is."""

    def __init__(self, context: BuildContext, width: int) -> None:
        super().__init__()
        heads = width // HEAD_SIZE
        if heads * HEAD_SIZE != width:
            raise ValueError(
                f"hidden_size {width} is not a multiple of {HEAD_SIZE}, the resampler's head size"
            )
        self.q, self.k, self.v = (Part(context, width, width, bias=True) for _ in range(3))
        self.out_proj = Linear(context, width, width, bias=True)
        self._attend = context.kernels.dense_attention(
            KernelQuery(
                op="dense_attention",
                dtype=dtype_name(context.dtype),
                num_heads=heads,
                num_kv_heads=heads,
                head_size=HEAD_SIZE,
            )
        )

    def slots(self) -> Iterator[Slot]:
        """Weight and bias of q, k and v, stacked."""
        for parts in zip(*(Linear.slots(part) for part in (self.q, self.k, self.v)), strict=True):
            rows, *columns = parts[0].shape
            yield Slot(f"in_proj_{parts[0].name}", (3 * rows, *columns), partial(put_parts, parts))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
        """query (Q, width), the same for every slice; key and value (P, width) -> (slices * Q, width)."""
        q, k, v = (x.unflatten(-1, (-1, HEAD_SIZE)) for x in (self.q(query), self.k(key), self.v(value)))
        q_lens = [len(query)] * len(lengths)
        attended = self._attend(q.repeat(len(lengths), 1, 1), k, v, q_lens, lengths, 1 / math.sqrt(HEAD_SIZE))
        return self.out_proj(attended.flatten(1))


def put_parts(parts: Sequence[Slot], stacked: Tensor) -> None:
    """Equal parts of a tensor into the slots."""
    for slot, part in zip(parts, stacked.chunk(len(parts)), strict=True):
        slot.put(part)


class Resampler(Module):
    """Features of slices of any shape -> ``num_queries`` embeddings of each.

    Args:
        context: build context.
        num_queries: per slice.
        width: of the language model.
        vision_width: of the features.
        query_positions: whether the checkpoint stores positions that are added to the queries (2.0).
    """

    def __init__(
        self,
        context: BuildContext,
        *,
        num_queries: int,
        width: int,
        vision_width: int,
        query_positions: bool,
    ) -> None:
        super().__init__()
        self.queries = Table(context, "query", (num_queries, width))
        self.query_positions = Table(context, "pos_embed", (num_queries, width)) if query_positions else None
        self.kv_proj = Linear(context, vision_width, width, bias=False)
        self.attn = CrossAttention(context, width)
        self.ln_q = LayerNorm(context, width, EPS)
        self.ln_kv = LayerNorm(context, width, EPS)
        self.ln_post = LayerNorm(context, width, EPS)
        self.out = OutProjection(context, width, width, bias=False)
        self._width = width

    def forward(self, features: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """features (P, vision_width) of slices one after another -> (slices * num_queries, width)."""
        value = self.ln_kv(self.kv_proj(features))
        key = value + positions_2d(shapes, self._width).to(value)
        query = self.ln_q(self.queries())
        if self.query_positions is not None:
            query = query + self.query_positions()
        x = self.attn(query, key, value, [rows * columns for rows, columns in shapes])
        return self.out(self.ln_post(x))
