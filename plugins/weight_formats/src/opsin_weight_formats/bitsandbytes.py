"""bitsandbytes (Dettmers et al. 2023).

4 bits (nf4, fp4): ``weight`` uint8, two indices of a table per byte, the high half first, in blocks of the
flattened matrix; ``weight.absmax`` the scale of each block, itself stored in 8 bits where ``nested_*`` are
there; ``weight.quant_map`` the table; ``weight.quant_state.*`` JSON as bytes. 8 bits: ``weight`` int8 (N, K)
and ``SCB`` (N,), the largest magnitude of each row.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from opsin.api import QuantizedWeight, StoredModule, WeightForm
from opsin_weight_formats.packing import part


def decode(stored: StoredModule) -> QuantizedWeight | Tensor:
    """See `opsin.api.WeightFormatSpec.decode`."""
    if "SCB" in stored.tensors:
        return _rows(stored)
    [name] = [name for name in stored.tensors if "quant_state" in name]
    state = json.loads(bytes(stored.tensors[name].tolist()))
    rows, wide = state["shape"]
    size = state["blocksize"]
    codes, table = part(stored, "weight").flatten(), part(stored, "weight.quant_map").float()
    blocks = -(-rows * wide // size)
    if codes.dtype != torch.uint8 or len(codes) != -(-rows * wide // 2) or table.shape != (16,):
        raise ValueError(
            f"weight has {len(codes)} bytes of {codes.dtype} for {rows} x {wide} indices of a table of 16"
        )
    scales = _scales(stored, state)
    if len(scales) != blocks:
        raise ValueError(f"{len(scales)} scales for {blocks} blocks of {size}")
    if wide % size or wide % 2:
        return _floats(codes, table, scales, size, rows, wide)
    swapped = (codes >> 4 | codes << 4).view(rows, wide // 2)
    return QuantizedWeight(
        form=WeightForm(kind="table4", group_size=size),
        codes=swapped,
        scales=scales.view(rows, wide // size),
        table=table,
        in_features=wide,
    )


def _scales(stored: StoredModule, state: dict[str, object]) -> Tensor:
    """float32 (blocks,)."""
    absmax = part(stored, "weight.absmax").flatten()
    if "weight.nested_absmax" not in stored.tensors:
        return absmax.float()
    outer = part(stored, "weight.nested_absmax").float().flatten()
    values = part(stored, "weight.nested_quant_map").float()[absmax.int()]
    size, offset = state["nested_blocksize"], state["nested_offset"]
    if not isinstance(size, int) or not isinstance(offset, (int, float)):
        raise ValueError(f"nested_blocksize is {size!r}, nested_offset {offset!r}; expected numbers")
    return values * outer.repeat_interleave(size)[: len(values)] + offset


def _floats(codes: Tensor, table: Tensor, scales: Tensor, size: int, rows: int, wide: int) -> Tensor:
    """float32 (N, K) where blocks run on from one row into the next."""
    halves = torch.stack((codes >> 4, codes & 0x0F), dim=1).flatten()[: rows * wide]
    per_element = scales.repeat_interleave(size)[: rows * wide]
    return (table[halves.int()] * per_element).view(rows, wide)


def _rows(stored: StoredModule) -> QuantizedWeight:
    weight, largest = part(stored, "weight"), part(stored, "SCB").float().flatten()
    layout = stored.tensors.get("weight_format")
    if layout is not None and int(layout) != 0:
        raise ValueError(f"weight_format is {int(layout)}; expected 0, rows one after another")
    if weight.dtype != torch.int8 or largest.shape != (weight.shape[0],):
        raise ValueError(f"weight is {tuple(weight.shape)} of {weight.dtype}, SCB {tuple(largest.shape)}")
    return QuantizedWeight(
        form=WeightForm(kind="int8"),
        codes=weight,
        scales=(largest / 127).unsqueeze(1),
        in_features=weight.shape[1],
    )
