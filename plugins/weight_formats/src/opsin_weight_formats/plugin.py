"""The torch-free door: what this plugin registers. Decoders are imported when a checkpoint needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from opsin import hookimpl
from opsin.api import QuantizedWeight, StoredModule, WeightFormatSpec

if TYPE_CHECKING:
    from torch import Tensor

_INTEGERS = ("qweight", "qzeros", "scales", "g_idx")
_COMPRESSED = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_INPUTS = ("input_scale", "input_zero_point")
_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_BLOCKS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")


def _decoder(module: str) -> Callable[[StoredModule], QuantizedWeight | Tensor]:
    def decode(stored: StoredModule) -> QuantizedWeight | Tensor:
        weight: QuantizedWeight | Tensor = import_module(f"opsin_weight_formats.{module}").decode(stored)
        return weight

    return decode


@hookimpl
def opsin_register_weight_formats() -> Sequence[WeightFormatSpec]:
    return [
        WeightFormatSpec(method="gptq", suffixes=_INTEGERS, marks=("qweight",), decode=_decoder("gptq")),
        WeightFormatSpec(method="awq", suffixes=_INTEGERS[:3], marks=("qweight",), decode=_decoder("awq")),
        WeightFormatSpec(
            method="auto-round", suffixes=_INTEGERS, marks=("qweight",), decode=_decoder("auto_round")
        ),
        WeightFormatSpec(
            method="compressed-tensors",
            suffixes=(*_COMPRESSED, *_INPUTS),
            marks=("weight_packed", "weight_scale"),
            decode=_decoder("compressed"),
        ),
        WeightFormatSpec(
            method="bitsandbytes",
            suffixes=(*_BLOCKS, *_STATES, "SCB", "weight_format"),
            marks=(*_STATES, "SCB"),
            decode=_decoder("bitsandbytes"),
        ),
        WeightFormatSpec(
            method="fp8",
            suffixes=("weight", "weight_scale", "weight_scale_inv", *_INPUTS),
            marks=("weight_scale", "weight_scale_inv"),
            decode=_decoder("fp8"),
        ),
    ]
