"""Rounding a weight of floats to fewer bits: to the nearest code, one scale per row or per group.

The only place where numbers of a checkpoint are given up. Layouts of checkpoints that are rounded already are
only read (`opsin.api.WeightFormatSpec`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from opsin.api import QuantizedWeight, Rounding, WeightForm, WeightKind

_TILE_ELEMENTS = 2**20
"""Rows are rounded in tiles of about so many elements, which stay in a processor's cache."""

_SMALLEST_SCALE = 1e-30


def round_weight(weight: Tensor, form: WeightForm) -> QuantizedWeight:
    """The nearest weight in a form.

    int8: ``scale = max(abs(w)) / 127``, codes -127 to 127. int4: the element of largest magnitude becomes
    -8 (``scale = -w / 8``, which may be negative), as in ggml's Q4_0: all 16 codes are in use.

    Args:
        weight: (N, K), of any floating dtype.
        form: of kind int8 or int4, without zero points; its groups divide K.

    Raises:
        ValueError: the form is none to round to, its groups do not divide K, or a number is not finite.
    """
    rows, wide = weight.shape
    group = form.group_size or wide
    if form.kind not in _ROUND or form.zero_points:
        raise ValueError(f"weights are rounded to int8 or int4 without zero points, not to {form}")
    if wide % group:
        raise ValueError(f"groups of {group} do not divide {wide} inputs")
    nearest = _ROUND[form.kind]
    packed = form.kind == "int4"
    codes = torch.empty(rows, -(-wide // 2) if packed else wide, dtype=torch.uint8 if packed else torch.int8)
    scales = torch.empty(rows, wide // group)
    tile = max(1, _TILE_ELEMENTS // wide)
    for first in range(0, rows, tile):
        part = weight[first : first + tile].to("cpu").float().view(-1, wide // group, group)
        found, scale = nearest(part)
        if not scale.isfinite().all():
            raise ValueError("a weight holds NaN or infinity, which cannot be rounded")
        found = found.view(-1, wide)
        codes[first : first + tile] = pack_halves(found) if packed else found
        scales[first : first + tile] = scale
    return QuantizedWeight(form=form, codes=codes, scales=scales, in_features=wide)


def pack_halves(codes: Tensor) -> Tensor:
    """uint8 (N, K) of 0 to 15 -> uint8 (N, ceil(K / 2)), as in `QuantizedWeight`."""
    low, high = codes[:, 0::2], codes[:, 1::2]
    packed = low.clone()
    packed[:, : high.shape[1]] |= high << 4
    return packed


def _to_int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """(N, G, group) -> int8 codes of that shape, scales (N, G)."""
    scale = (groups.abs().amax(-1) / 127).clamp(min=_SMALLEST_SCALE)
    return (groups / scale.unsqueeze(-1)).round_().to(torch.int8), scale


def _to_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """(N, G, group) -> uint8 codes of that shape, scales (N, G)."""
    low, high = groups.aminmax(dim=-1)
    extreme = torch.where(-low >= high, low, high)
    scale = extreme / -8
    scale = torch.where(scale.abs() < _SMALLEST_SCALE, torch.full_like(scale, _SMALLEST_SCALE), scale)
    codes = (groups / scale.unsqueeze(-1)).round_().clamp_(-8, 7).add_(8)
    return codes.to(torch.uint8), scale


_ROUND: Mapping[WeightKind, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"int8": _to_int8, "int4": _to_int4}


# ---- What a device may be asked for ----------------------------------------------------------------


def usable_forms(form: WeightForm, rounding: Rounding) -> Iterator[WeightForm]:
    """The forms that a weight stored in one may be used in, the best first; none: it becomes floats.

    As it is, with rounded activations where they are allowed; if the user has allowed rounding, as int8 with
    a scale per row, which more devices multiply fast; then the same with activations left as they are.
    """
    if not rounding.keep_stored:
        return
    rows = WeightForm(kind="int8")
    forms = [replace(form, round_activations=False)]
    if rounding.allowed and forms != [rows]:
        forms.append(rows)
    if form.round_activations or rounding.allowed:
        yield from (replace(one, round_activations=True) for one in forms)
    yield from forms


def in_form(weight: QuantizedWeight, form: WeightForm) -> QuantizedWeight:
    """A weight in one of its `usable_forms`."""
    if replace(form, round_activations=False) == replace(weight.form, round_activations=False):
        return replace(weight, form=form)
    return round_weight(weight.dequantize(torch.float32), form)
