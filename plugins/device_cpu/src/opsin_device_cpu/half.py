"""Float16 copies of weights, for products of few rows: half the bytes to read, no digit lost.

A checkpoint's weights are nearly always bfloat16 numbers, whatever dtype they run in. A power of two brings
them into float16's range, where each has one bit pattern. FBGEMM multiplies float32 activations with float16
weights in float32, so the result is that of the float32 weights up to the order of summation.
Numbers: docs/decisions/0020-cpu-linear.md.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import Any

import torch
from torch import Tensor

from opsin.api import LinearFn

CHECK_ELEMENTS = 2**18
"""A weight is examined in tiles that stay in the L2 cache."""

PART_ELEMENTS = 2**24
"""FBGEMM packs a weight with very many rows at a third of its usual rate; larger ones are cut."""


def float16_exponent(weight: Tensor) -> int | None:
    """e such that ``weight * 2**e`` in float16 loses nothing that float32 arithmetic would notice.

    What is 2**30 times smaller than the largest weight may be rounded: a float32 sum over both would not
    keep it. None where there is no such e.
    """
    low, high = (bound.item() for bound in weight.aminmax())
    largest = max(-low, high)
    if largest == 0 or not math.isfinite(largest):
        return None
    exponent = 15 - math.frexp(largest)[1]  # the largest lands in [2**14, 2**15)
    scale, limit = 2.0**exponent, largest * 2.0**-30
    for part in weight.split(max(1, CHECK_ELEMENTS // weight.shape[1])):
        wide = part.float()
        lost = wide.mul(scale).half().float().div_(scale).sub_(wide).abs_().max().item()
        if lost > limit:
            return None
    return exponent


class Float16Copies:
    """Makes copies while the next weights are loaded; packing takes about 12 ns an element and thread.

    Args:
        num_bytes: how much memory copies may take together. Weights are served in the order they come,
            so that a given machine and checkpoint always end up alike.
        threads: how many pack at the same time. No more than that many weights wait for it.
    """

    def __init__(self, num_bytes: int, threads: int) -> None:
        self.bytes_left = num_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="opsin-cpu-pack")
        self._room = BoundedSemaphore(threads)

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearFn | None:
        """x @ weight.T + bias over a copy: float32 in and out; None if there will be none.

        Its first call waits until the copy is made.
        """
        num_bytes = 2 * weight.numel()
        if num_bytes > self.bytes_left or torch.backends.quantized.engine not in ("x86", "fbgemm"):
            return None
        exponent = float16_exponent(weight)
        if exponent is None:
            return None
        self.bytes_left -= num_bytes
        rows = max(1, PART_ELEMENTS // weight.shape[1])
        weights = weight.split(rows)
        biases = [None] * len(weights) if bias is None else bias.float().split(rows)
        parts = [self._submit(part, shift, 2.0**exponent) for part, shift in zip(weights, biases)]
        return _linear(parts, 2.0**-exponent)

    def _submit(self, weight: Tensor, bias: Tensor | None, scale: float) -> Future[Any]:
        self._room.acquire()
        future = self._pool.submit(_pack, weight, bias, scale)
        future.add_done_callback(lambda _: self._room.release())
        return future


def _pack(weight: Tensor, bias: Tensor | None, scale: float) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight.float() * scale, bias)


def _linear(parts: list[Future[Any]], scale: float) -> LinearFn:
    call = torch.ops.quantized.linear_dynamic_fp16.default

    def linear(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return linear(x.unsqueeze(0)).squeeze(0)
        scaled = torch.mul(x, scale)
        outputs: list[Tensor] = [call(scaled, part.result()) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    return linear
