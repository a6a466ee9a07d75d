"""One small case for each kernel, against torch on the host: what is wrong with it, or nothing.

No public text says how MLU370 and torch_mlu_ops 1.3.2 behave in every respect, and where texts disagree the
wrong reading gives wrong numbers rather than an error. So kernels are tried before they are used. The cases
are small: what they look for (a window of one token, a table that is not read, rotation that never happens,
the other GELU) is wrong by far more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.api import (
    Activation,
    AttentionBatch,
    DenseAttention,
    GatedAct,
    KVGeometry,
    LayerNorm,
    LinearFn,
    QuantizedWeight,
    RMSNorm,
    Rotary,
    WeightForm,
)
from opsin_device_mlu.attention import KVWriter, MluPlan, PagedAttention, allocate_kv, plan_attention
from opsin_device_mlu.linear import ON_RESULT

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.float32: 5e-3}
"""Largest error, as a share of the largest expected number. The vendor's own tests allow 3e-3 in float32."""

_BLOCK = 16
_FILL = 3.0
"""What stands where nothing may be written."""

_WIDTH, _ROWS = 96, 48


class Wrong(Exception):
    """A kernel's result is not what it should be. The text says how."""


@dataclass(frozen=True)
class Bench:
    """Where kernels are tried, and in which dtype."""

    device: str
    dtype: torch.dtype

    def draw(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Host numbers that the dtype can hold."""
        generator = torch.Generator().manual_seed(seed + math.prod(shape))
        return (torch.randn(shape, generator=generator) * scale).to(self.dtype).float()

    def put(self, x: Tensor) -> Tensor:
        """Host numbers -> the card."""
        return x.to(self.dtype).to(self.device)

    def side_by_side(self, *parts: Tensor) -> list[Tensor]:
        """Host tensors (T, heads, D) -> views of one fused tensor on the card."""
        rows, size = parts[0].shape[0], parts[0].shape[-1]
        fused = self.put(torch.cat([part.flatten(1) for part in parts], dim=1))
        widths = [part.shape[1] * size for part in parts]
        return [x.view(rows, -1, size) for x in fused.split(widths, dim=1)]

    def compare(self, got: Any, expected: Tensor, what: str) -> None:
        """Raises `Wrong`."""
        if not isinstance(got, Tensor) or got.shape != expected.shape:
            shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise Wrong(f"{what}: gave {shape}, expected {tuple(expected.shape)}")
        there = got.to("cpu").float()
        error, largest = (there - expected).abs().max().item(), expected.abs().max().item()
        if not error <= TOLERANCE[self.dtype] * largest:
            raise Wrong(f"{what}: off by {error:.3g} where numbers go up to {largest:.3g}")


def rms_norm(bench: Bench, kernel: RMSNorm) -> None:
    """With and without residual."""
    x, added, weight = bench.draw(5, 64), bench.draw(5, 64, seed=1), bench.draw(64) + 2
    for residual in (None, added):
        h = x if residual is None else x + residual
        expected = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
        given = None if residual is None else bench.put(residual)
        normed, total = kernel(bench.put(x), bench.put(weight), 1e-6, given)
        bench.compare(normed, expected, "the norm")
        bench.compare(total, h, "the sum before it")


def layer_norm(bench: Bench, kernel: LayerNorm) -> None:
    """With and without bias."""
    x, weight, shift = bench.draw(5, 64) + 1, bench.draw(64) + 2, bench.draw(64, seed=1)
    for bias in (shift, None):
        expected = F.layer_norm(x, (64,), weight, bias, 1e-6)
        given = None if bias is None else bench.put(bias)
        bench.compare(kernel(bench.put(x), bench.put(weight), given, 1e-6), expected, "the norm")


def gated_act(activation: Activation) -> Callable[[Bench, GatedAct], None]:
    """Which half is the gate, and which function it goes through."""

    def trial(bench: Bench, kernel: GatedAct) -> None:
        x = bench.draw(5, 64)
        gate, up = x.chunk(2, -1)
        bench.compare(kernel(bench.put(x), activation), ON_RESULT[activation](gate) * up, activation)
        gate = _activated(bench)
        x = torch.cat((gate, torch.ones_like(gate)), dim=-1)
        _exactly(bench, kernel(bench.put(x), activation), activation, gate)

    return trial


def elementwise(activation: Activation) -> Callable[[Bench, Callable[[Tensor], Tensor]], None]:
    """Which function it is."""

    def trial(bench: Bench, kernel: Callable[[Tensor], Tensor]) -> None:
        x = _activated(bench)
        _exactly(bench, kernel(bench.put(x)), activation, x)

    return trial


def _activated(bench: Bench) -> Tensor:
    """(2, 32) from -5 to 5."""
    return torch.linspace(-5, 5, 64).view(2, 32).to(bench.dtype).float()


def _exactly(bench: Bench, got: Any, activation: Activation, x: Tensor) -> None:
    """Exact and approximate GELU differ by 4e-4 where both are small: only a share of each number tells."""
    expected = ON_RESULT[activation](x)
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        raise Wrong(f"{activation}: gave {getattr(got, 'shape', type(got).__name__)}")
    share = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 1e-3}[bench.dtype]
    error = (got.to("cpu").float() - expected).abs()
    allowed = share * expected.abs() + (2e-4 if bench.dtype == torch.bfloat16 else 1e-4)
    if not bool((error <= allowed).all()):
        worst = int((error - allowed).argmax())
        raise Wrong(
            f"{activation}({x.flatten()[worst].item():.3g}) is {got.to('cpu').flatten()[worst].item():.5g}, "
            f"expected {expected.flatten()[worst].item():.5g}"
        )


def rotary(bench: Bench, kernel: Rotary) -> None:
    """Several tokens and one, beside values that must stay."""
    for rows in (7, 1):
        q, k, v = (bench.draw(rows, heads, 64, seed=heads) for heads in (4, 2, 3))
        cos, sin = _tables(rows, 64)
        on_q, on_k, on_v = bench.side_by_side(q, k, v)
        new_q, new_k = kernel(on_q, on_k, cos.to(bench.device), sin.to(bench.device))
        bench.compare(new_q, _turned(q, cos, sin), f"{rows} rotated queries")
        bench.compare(new_k, _turned(k, cos, sin), f"{rows} rotated keys")
        bench.compare(on_v, v, "values beside them")


def partial_rotary(bench: Bench, kernel: Rotary) -> None:
    """Half of each head."""
    q, k = bench.draw(7, 4, 64), bench.draw(7, 2, 64)
    cos, sin = _tables(7, 32)
    on_q, on_k = bench.side_by_side(q, k)
    for got, x in zip(kernel(on_q, on_k, cos.to(bench.device), sin.to(bench.device)), (q, k)):
        expected = torch.cat((_turned(x[..., :32], cos, sin), x[..., 32:]), dim=-1)
        bench.compare(got, expected, "half of each head rotated")


def _tables(rows: int, width: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(rows).float() * 3 + 2
    angles = positions[:, None] * 100.0 ** -(torch.arange(width // 2) / (width // 2))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


# ---- Attention -----------------------------------------------------------------------------------

_HEADS, _KV_HEADS = 4, 2


def write_kv(size: int) -> Callable[[Bench, KVWriter], None]:
    """Scattered slots are written, all others stay."""

    def trial(bench: Bench, kernel: KVWriter) -> None:
        q, k, v = (bench.draw(19, heads, size, seed=heads) for heads in (_HEADS, _KV_HEADS, 3))
        v = v[:, :_KV_HEADS]
        slots = [(7 * i) % 48 for i in range(19)]
        layer = _layer(bench, 3, size)
        layer.keys.fill_(_FILL)
        layer.values.fill_(_FILL)
        on_k, on_v = bench.side_by_side(q, k, v)[1:]
        numbers = torch.tensor(slots, dtype=torch.int32).to(bench.device)
        kernel(on_k, on_v, layer, MluPlan(slots=numbers, parts=[]))
        for name, x, cache in (("keys", k, layer.k), ("values", v, layer.v)):
            expected = torch.full((48, _KV_HEADS, size), _FILL)
            expected[slots] = x
            bench.compare(cache.to("cpu").reshape(48, _KV_HEADS, size), expected, f"{name} in the cache")

    return trial


def paged_attention(
    size: int, sequences: Sequence[tuple[int, int]]
) -> Callable[[Bench, PagedAttention], None]:
    """A step over (queries, context) of several sequences, whose blocks lie in any order."""

    def trial(bench: Bench, kernel: PagedAttention) -> None:
        contexts = [context for _, context in sequences]
        counts = [-(-context // _BLOCK) for context in contexts]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3)).tolist()
        tables = [[order.pop() for _ in range(count)] for count in counts]
        layer = _layer(bench, sum(counts), size)
        keys = [bench.draw(context, _KV_HEADS, size, seed=i) for i, context in enumerate(contexts)]
        values = [bench.draw(context, _KV_HEADS, size, seed=50 + i) for i, context in enumerate(contexts)]
        for table, k, v in zip(tables, keys, values):
            slots = [table[i // _BLOCK] * _BLOCK + i % _BLOCK for i in range(len(k))]
            for x, cache in ((k, layer.keys), (v, layer.values)):
                flat = cache.to("cpu").transpose(1, 2).flatten(0, 1).clone()
                flat[slots] = x.to(flat.dtype)
                cache.copy_(
                    flat.view(-1, _BLOCK, _KV_HEADS, size).transpose(1, 2).contiguous().to(bench.device)
                )
        new = [
            [table[i // _BLOCK] * _BLOCK + i % _BLOCK for i in range(context - queries, context)]
            for (queries, context), table in zip(sequences, tables)
        ]
        batch = AttentionBatch(
            query_lens=[queries for queries, _ in sequences],
            context_lens=contexts,
            block_tables=tables,
            slots=[slot for slots in new for slot in slots],
            block_size=_BLOCK,
            device=bench.device,
        )
        plan = plan_attention(batch)
        q = bench.draw(sum(batch.query_lens), _HEADS, size, seed=7)
        step_k, step_v = (
            torch.cat([x[context - queries :] for x, (queries, context) in zip(parts, sequences)])
            for parts in (keys, values)
        )
        on_q, on_k, on_v = bench.side_by_side(q, step_k, step_v)
        plan.written = (layer, on_k, on_v)
        got = kernel(on_q, layer, plan, size**-0.5)
        expected = [
            _attend(part, k, v, size**-0.5, causal=True)
            for part, k, v in zip(q.split(list(batch.query_lens)), keys, values)
        ]
        bench.compare(got, torch.cat(expected), f"attention of {list(sequences)} (queries, context)")

    return trial


def dense_attention(size: int) -> Callable[[Bench, DenseAttention], None]:
    """Segments that see themselves, and segments that see others."""

    def trial(bench: Bench, kernel: DenseAttention) -> None:
        for q_lens, k_lens in (([3, 20], None), ([3, 20], [9, 4])):
            keys = q_lens if k_lens is None else k_lens
            q = bench.draw(sum(q_lens), _HEADS, size)
            k, v = (bench.draw(sum(keys), _HEADS, size, seed=seed) for seed in (1, 2))
            on_k, on_v = bench.side_by_side(k, v)
            got = kernel(bench.side_by_side(q, q)[0], on_k, on_v, q_lens, k_lens, size**-0.5)
            parts = zip(q.split(q_lens), k.split(keys), v.split(keys))
            expected = [_attend(*part, size**-0.5, causal=False) for part in parts]
            bench.compare(got, torch.cat(expected), f"attention of {q_lens} over {keys}")

    return trial


def _layer(bench: Bench, blocks: int, size: int) -> Any:
    geometry = KVGeometry(num_layers=1, num_kv_heads=_KV_HEADS, head_size=size)
    [layer] = allocate_kv(blocks, _BLOCK, geometry, bench.dtype, device=bench.device, head_sizes=[size])
    return layer


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) * scale
    if causal:
        rows, columns = scores.shape[-2:]
        later = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
        scores = scores.masked_fill(later, float("-inf"))
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v)


# ---- Linear layers -------------------------------------------------------------------------------

Prepare = Callable[[Tensor, "Tensor | None", "Activation | None"], LinearFn]


def linear(activation: Activation | None) -> Callable[[Bench, Prepare], None]:
    """One row and several, with and without bias."""

    def trial(bench: Bench, prepare: Prepare) -> None:
        weight = bench.draw(_ROWS, _WIDTH, scale=0.2)
        for bias in (bench.draw(_ROWS), None):
            given = None if bias is None else bench.put(bias)
            layer = prepare(bench.put(weight), given, activation)
            for rows in (5, 1):
                x = bench.draw(rows, _WIDTH, seed=rows)
                _judge(bench, layer(bench.put(x)), F.linear(x, weight, bias), activation)
        if activation is not None:
            x = _activated(bench)
            same = prepare(bench.put(torch.eye(32)), None, activation)
            _exactly(bench, same(bench.put(x)), activation, x)

    return trial


def quantized_linear(
    weight: QuantizedWeight, activation: Activation | None
) -> Callable[[Bench, Prepare], None]:
    """A layer over ``weight``, which the preparer brings by itself."""
    floats = weight.dequantize(torch.float32)

    def trial(bench: Bench, prepare: Prepare) -> None:
        for bias in (bench.draw(len(floats)), None):
            given = None if bias is None else bench.put(bias)
            layer = prepare(floats, given, activation)
            for rows in (5, 1):
                x = bench.draw(rows, floats.shape[1], seed=rows)
                _judge(bench, layer(bench.put(x)), F.linear(x, floats, bias), activation)

    return trial


def drawn_weight(form: WeightForm) -> QuantizedWeight:
    """A weight of 24 rows whose codes take all values and whose scales differ."""
    wide = 2 * (form.group_size or 64)
    generator = torch.Generator().manual_seed(5)
    low, high = (-127, 128) if form.kind == "int8" else (0, 16)
    codes = torch.randint(low, high, (24, wide), generator=generator)
    if form.kind == "int8":
        stored = codes.to(torch.int8)
    else:
        stored = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
    groups = 1 if form.group_size is None else 2
    steps = (torch.rand(24, groups, generator=generator) + 0.5) / (500 if form.kind == "int8" else 50)
    scales = steps.half().float()
    return QuantizedWeight(form=form, codes=stored, scales=scales, in_features=wide)


def _judge(bench: Bench, got: Any, product: Tensor, activation: Activation | None) -> None:
    expected = product if activation is None else ON_RESULT[activation](product)
    bench.compare(got, expected, f"a product, {activation or 'no'} activation")
