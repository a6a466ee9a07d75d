"""The machine's floors: how fast it reads memory, and how fast it multiplies matrices.

No engine can decode one sequence faster than it reads the weights, nor prefill faster than it multiplies.
Both floors are measured, with plain torch and with the threads that the engines get: the best that any of
several calls reached, in rounds spread over a while, because a shared machine has slow moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from costs import Attention, Gemm

if TYPE_CHECKING:
    import torch
    from sides import DType

BUFFER_BYTES = 2 * 2**30
"""Read buffer: as large as the model's weights, far beyond any cache."""

LARGE_GEMMS = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096))
"""(rows, depth, columns) tried besides the model's own shapes: sizes at which a library is at its best."""


@dataclass(frozen=True, kw_only=True)
class Floors:
    """Rates of this machine.

    Attributes:
        bandwidth: bytes/s, the best call of ``bandwidths``.
        bandwidths: by call, best of all rounds.
        gemm_rate: FLOP/s of the best shape.
        gemm_rates: "rows x depth x columns" -> FLOP/s, best of all rounds.
    """

    bandwidth: float
    bandwidths: Mapping[str, float]
    gemm_rate: float
    gemm_rates: Mapping[str, float]

    def at_best_rate_s(self, work: list[Gemm | Attention]) -> float:
        """Seconds for all of ``work`` if every operation ran at the rate of the best GEMM."""
        return sum(item.flops for item in work) / self.gemm_rate

    def at_own_rates_s(self, work: list[Gemm | Attention]) -> float:
        """Seconds if every GEMM ran as fast as torch runs its shape alone; attention at the best rate."""
        seconds = 0.0
        for item in work:
            rate = self.gemm_rates.get(shape_name(item), 0.0) if isinstance(item, Gemm) else 0.0
            seconds += item.flops / (rate or self.gemm_rate)
        return seconds


def shape_name(gemm: Gemm) -> str:
    """The key of a GEMM's shape in `Floors.gemm_rates`."""
    return f"{gemm.rows} x {gemm.depth} x {gemm.columns}"


def measure(work: list[Gemm | Attention], dtype: DType, threads: int, rounds: int) -> Floors:
    """Measure both floors in this process. Needs `BUFFER_BYTES` of memory and a quiet machine.

    Args:
        work: whose GEMM shapes are measured; those of one row are left to the bandwidth.
        dtype: element type of the GEMMs, and of the buffer read.
        threads: of torch.
        rounds: times each call is measured; the best counts.
    """
    import torch

    torch.set_num_threads(threads)
    element = getattr(torch, dtype)
    shapes = {(g.rows, g.depth, g.columns) for g in work if isinstance(g, Gemm) and g.rows > 1}
    with torch.inference_mode():
        bandwidths = _bandwidths(element, rounds)
        rates = {
            shape_name(Gemm(name="", rows=m, depth=k, columns=n, count=1)): _gemm_rate(
                m, k, n, element, rounds
            )
            for m, k, n in sorted(shapes | set(LARGE_GEMMS))
        }
    return Floors(
        bandwidth=max(bandwidths.values()),
        bandwidths=bandwidths,
        gemm_rate=max(rates.values()),
        gemm_rates=rates,
    )


def best_of(measured: list[Floors]) -> Floors:
    """The best of several measurements, rate by rate."""
    bandwidths = {
        name: max(floors.bandwidths[name] for floors in measured) for name in measured[0].bandwidths
    }
    rates = {name: max(floors.gemm_rates[name] for floors in measured) for name in measured[0].gemm_rates}
    return Floors(
        bandwidth=max(bandwidths.values()),
        bandwidths=bandwidths,
        gemm_rate=max(rates.values()),
        gemm_rates=rates,
    )


def _bandwidths(element: torch.dtype, rounds: int) -> dict[str, float]:
    """Bytes/s of several ways to read the whole buffer once."""
    import torch

    depth = 4096  # elements; a row of several pages
    matrix = torch.ones((BUFFER_BYTES // (element.itemsize * depth), depth), dtype=element)
    flat, words = matrix.view(-1), matrix.view(torch.int64)
    vector = torch.ones(depth, dtype=element)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "matrix-vector product": lambda: torch.mv(matrix, vector),
        "dot product": lambda: torch.dot(flat, flat),
        "maximum": lambda: words.amax(),
    }
    return {name: BUFFER_BYTES / _best_s(call, rounds) for name, call in calls.items()}


def _gemm_rate(rows: int, depth: int, columns: int, element: torch.dtype, rounds: int) -> float:
    """FLOP/s of x @ w.T: the best of w as stored, transposed beforehand, and packed by oneDNN."""
    import torch

    x = torch.randn(rows, depth).to(element)
    weight = torch.randn(columns, depth).to(element)
    transposed = weight.T.contiguous()
    products: list[Callable[[], torch.Tensor]] = [
        lambda: torch.nn.functional.linear(x, weight),
        lambda: torch.mm(x, transposed),
    ]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        linear = torch.ops.mkldnn._linear_pointwise.default
        products.append(lambda: linear(x, packed, None, "none", [], ""))
    flops = 2 * rows * depth * columns
    # Several calls at a time, 2 GFLOP at least: one small product is over before the threads are awake.
    repeats = max(1, int(2e9 / flops))

    def repeated(product: Callable[[], torch.Tensor]) -> None:
        for _ in range(repeats):
            product()

    return repeats * flops / min(_best_s(partial(repeated, product), rounds) for product in products)


def int8_rate(rows: int, depth: int, columns: int, rounds: int) -> float:
    """Operations per second of a product of 8-bit integers: the best of torch's and oneDNN's, packed."""
    import torch

    x = torch.randint(-127, 128, (rows, depth), dtype=torch.int8)
    weight = torch.randint(-127, 128, (columns, depth), dtype=torch.int8)
    transposed = weight.T.contiguous()
    products: list[Callable[[], torch.Tensor]] = [lambda: torch._int_mm(x, transposed)]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.onednn.qlinear_prepack(weight, [rows, depth])
        unsigned = x.to(torch.int16).add(128).to(torch.uint8)
        scales, zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int64)
        linear = torch.ops.onednn.qlinear_pointwise.default
        products.append(
            lambda: linear(
                unsigned, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )
        )
    flops = 2 * rows * depth * columns
    repeats = max(1, int(4e9 / flops))

    def repeated(product: Callable[[], torch.Tensor]) -> None:
        for _ in range(repeats):
            product()

    return repeats * flops / min(_best_s(partial(repeated, product), rounds) for product in products)


def _best_s(call: Callable[[], object], rounds: int) -> float:
    call()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
