"""What the layouts have in common: codes packed into 32-bit words, groups, and the weight they make."""

from __future__ import annotations

import torch
from torch import Tensor

from opsin.api import QuantizedWeight, StoredModule, WeightForm

MIDDLE = {4: 8, 8: 128}
"""The unsigned code that means zero where a layout is symmetric."""


def part(stored: StoredModule, name: str) -> Tensor:
    """A tensor of the module.

    Raises:
        ValueError: it is not there.
    """
    if name not in stored.tensors:
        raise ValueError(f"{name} is missing")
    return stored.tensors[name]


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 (R, C) -> uint8 (R, C * 32 / bits): the codes of a word stand from its lowest bits upwards."""
    if words.dtype != torch.int32 or words.ndim != 2:
        raise ValueError(
            f"packed codes are {tuple(words.shape)} of {words.dtype}; expected two-dimensional int32"
        )
    data = words.contiguous().view(torch.uint8)  # little-endian, like the layouts
    if bits == 8:
        return data
    halves = torch.empty(*data.shape, 2, dtype=torch.uint8)
    halves[..., 0], halves[..., 1] = data & 0x0F, data >> 4
    return halves.flatten(1)


def integer_weight(
    codes: Tensor,
    zeros: Tensor | None,
    scales: Tensor,
    bits: int,
    *,
    order: Tensor | None = None,
    round_activations: bool = False,
) -> QuantizedWeight:
    """Of unsigned codes of 4 or 8 bits.

    Args:
        codes: uint8 (N, K).
        zeros: (N, G), the unsigned code that means zero in each group; None: the middle one.
        scales: (N, G), of any floating dtype.
        bits: 4 or 8.
        order: see `QuantizedWeight`.
        round_activations: see `opsin.api.WeightForm`.

    Raises:
        ValueError: the tensors do not fit each other.
    """
    rows, wide = codes.shape
    groups = scales.shape[1]
    if scales.shape[0] != rows or wide % groups:
        raise ValueError(f"scales are {tuple(scales.shape)} for codes {tuple(codes.shape)}")
    if zeros is not None:
        zeros = zeros.to(torch.int16)
        if zeros.shape != scales.shape:
            raise ValueError(f"zero points are {tuple(zeros.shape)}, scales {tuple(scales.shape)}")
        if bool((zeros == MIDDLE[bits]).all()):
            zeros = None
    if bits == 8:
        codes = (codes ^ 0x80).view(torch.int8)
        zeros = None if zeros is None else zeros - 128
    else:
        codes = _halves(codes)
    form = WeightForm(
        kind="int8" if bits == 8 else "int4",
        group_size=None if groups == 1 else wide // groups,
        zero_points=zeros is not None,
        round_activations=round_activations,
    )
    return QuantizedWeight(
        form=form,
        codes=codes.contiguous(),
        scales=scales.float().contiguous(),
        zeros=None if zeros is None else zeros.contiguous(),
        in_features=wide,
        order=order,
    )


def _halves(codes: Tensor) -> Tensor:
    """uint8 (N, K) of 0 to 15 -> uint8 (N, ceil(K / 2)), the even column in the low half."""
    packed = codes[:, 0::2].clone()
    odd = codes[:, 1::2]
    packed[:, : odd.shape[1]] |= odd << 4
    return packed


def sorted_groups(codes: Tensor, group_of: Tensor | None, groups: int) -> tuple[Tensor, Tensor | None] | None:
    """Codes whose columns stand group by group, and the inputs they belong to; None: groups are uneven.

    Args:
        codes: (N, K).
        group_of: (K,), the group of each input; None: they stand in order.
        groups: how many there are.

    Raises:
        ValueError: a group does not exist.
    """
    wide = codes.shape[1]
    if group_of is None:
        return codes, None
    group_of = group_of.to(torch.int64)
    if group_of.shape != (wide,) or bool((group_of < 0).any()) or bool((group_of >= groups).any()):
        raise ValueError(f"groups of {tuple(group_of.shape)} inputs for {wide}, out of {groups} groups")
    if bool((group_of[1:] >= group_of[:-1]).all()):
        order = None
    else:
        order = group_of.argsort(stable=True)
        codes = codes.index_select(1, order)
    if wide % groups or not bool((group_of.bincount(minlength=groups) == wide // groups).all()):
        return None
    return codes, order


def by_input(codes: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> Tensor:
    """float32 (N, K) of codes (N, K) whose inputs belong to groups of different sizes."""
    index = group_of.to(torch.int64)
    return (codes.float() - zeros.float()[:, index]) * scales.float()[:, index]
