"""The machine's floors, for every kind of arithmetic, and what they mean for a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import floors
import synthetic
import worker
from costs import Attention, Costs, Gemm, total_flops
from floors import Floors
from report import TYPICAL_PROMPT
from workloads import Workload, image_patches

from peers.catalogue import Row

ROUNDS = 7
DTYPES = ("float32", "bfloat16", "int8")


def measure(dtype: str, threads: int) -> Floors:
    """Measure one kind of arithmetic, and the memory, in a fresh process."""
    work = Costs(synthetic.CONFIG).prefill(TYPICAL_PROMPT, image_patches())
    if dtype == "int8":
        return worker.call(int8_floors, work, threads, ROUNDS, threads=threads)
    return worker.call(floors.measure, work, dtype, threads, ROUNDS, threads=threads)


def int8_floors(work: Sequence[Gemm | Attention], threads: int, rounds: int) -> Floors:
    """Rates of 8-bit products, the best of oneDNN's and torch's own. The bandwidth is not measured again."""
    import torch

    torch.set_num_threads(threads)
    shapes = {(g.rows, g.depth, g.columns) for g in work if isinstance(g, Gemm) and g.rows > 1}
    rates = {}
    for rows, depth, columns in sorted(shapes | set(floors.LARGE_GEMMS)):
        name = floors.shape_name(Gemm(name="", rows=rows, depth=depth, columns=columns, count=1))
        rates[name] = floors.int8_rate(rows, depth, columns, rounds)
    return Floors(bandwidth=0.0, bandwidths={}, gemm_rate=max(rates.values()), gemm_rates=rates)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Best rates so far.

    Attributes:
        bandwidth: bytes/s.
        rates: FLOP/s of matrix products, by dtype.
    """

    bandwidth: float
    rates: Mapping[str, float]

    @classmethod
    def best(cls, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> Machine | None:
        """Of all measurements; None if there are not enough."""
        if set(DTYPES) - set(measured):
            return None
        every = [floors for measurements in measured.values() for floors in measurements]
        return cls(
            bandwidth=max(floors["bandwidth"] for floors in every),
            rates={dtype: max(f["gemm_rate"] for f in measured[dtype]) for dtype in DTYPES},
        )

    def token_s(self, row: Row, num_sequences: int = 1, num_new: int = 64) -> float | None:
        """Least seconds of a decode step: bytes over bandwidth, or FLOPs over rate, the larger."""
        if row.layer_bits is None or row.head_bits is None:
            return None
        contexts = [TYPICAL_PROMPT + num_new // 2] * num_sequences
        costs = Costs(synthetic.CONFIG)
        head = synthetic.CONFIG["vocab_size"] * synthetic.CONFIG["hidden_size"]
        cached = costs.decode_bytes(contexts, 1) - costs.decode_bytes([0], 1)
        layers = costs.decode_bytes([0], 1) - head
        num_bytes = (
            layers * row.layer_bits + head * row.head_bits + cached * min(32, max(16, row.layer_bits))
        ) / 8
        return max(num_bytes / self.bandwidth, self._products_s(row, costs.decode(contexts)))

    def first_token_s(self, row: Row, computes_in: str = "") -> float:
        """Least seconds of a prompt: products at the row's rate, attention in floats."""
        work = Costs(synthetic.CONFIG).prefill(TYPICAL_PROMPT, image_patches())
        return self._products_s(row, work, computes_in)

    def batch_s(self, row: Row, workload: Workload, computes_in: str = "") -> float | None:
        """Least seconds of requests that share nothing, prompts and decode steps."""
        step = self.token_s(row, workload.num_requests, workload.new_tokens)
        if step is None:
            return None
        prompts = workload.num_requests * self.first_token_s(row, computes_in)
        return prompts + (workload.new_tokens - 1) * step

    def _products_s(self, row: Row, work: list[Gemm | Attention], computes_in: str = "") -> float:
        floats = "bfloat16" if "bf16" in computes_in or "bfloat16" in computes_in else "float32"
        rate = "int8" if row.rate == "int8" else row.rate if row.rate == "bfloat16" else floats
        products = total_flops([item for item in work if isinstance(item, Gemm)])
        attention = total_flops(work) - products
        return products / self.rates[rate] + attention / self.rates[floats]
