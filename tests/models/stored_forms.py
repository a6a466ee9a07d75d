"""Checkpoints of fewer bits, made from the recorded ones: each layout, and the same weights as floats.

Packers are written here from the layouts' descriptions, or are the libraries that define them (bitsandbytes,
compressed-tensors); none is opsin's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.golden import GOLDEN

Tensors = dict[str, Tensor]
Packed = tuple[Tensors, Tensor]
"""What is stored under a module's name, and the float weight (N, K) that it stands for."""

_LAYERS = re.compile(
    r"layers\.\d+\..*(proj|qkv|o_proj|fc1|fc2|mlp\.\d)\.weight$|layers\.\d+\..*w[123]\.weight$"
)


@dataclass(frozen=True)
class Layout:
    """A layout.

    Attributes:
        settings: ``quantization_config``.
        pack: weight float32 (N, K) -> what is stored.
        tower: whether the vision tower is quantised, too.
    """

    settings: Mapping[str, Any]
    pack: Callable[[Tensor], Packed | None]
    tower: bool = False


def groups_of(weight: Tensor, size: int) -> Tensor:
    return weight.view(len(weight), -1, size if size > 0 else weight.shape[1])


def rounded(weight: Tensor, bits: int, size: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes (N, K), zero points (N, G), float16 scales (N, G)."""
    parts, most = groups_of(weight, size), 2**bits - 1
    if symmetric:
        scale = (parts.abs().amax(-1) / (2 ** (bits - 1) - 1)).clamp(min=1e-6).half()
        zero = torch.full(scale.shape, 2 ** (bits - 1))
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = ((high - low) / most).clamp(min=1e-6).half()
        zero = (-low / scale.float()).round().clamp(1, most).long()
    codes = (parts / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)
    return codes.clamp(0, most).long().view(weight.shape), zero, scale


def floats(codes: Tensor, zero: Tensor, scale: Tensor, group_of: Tensor) -> Tensor:
    return (codes - zero[:, group_of]).float() * scale.float()[:, group_of]


def words(codes: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """(R, C) -> int32 (R, C * bits / 32), in a loop over the places of a word."""
    per = 32 // bits
    packed = torch.zeros(codes.shape[0], codes.shape[1] // per, dtype=torch.int64)
    for place in range(per):
        source = place if places is None else places[place]
        packed |= codes[:, source::per] << (bits * place)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()


def gptq(
    bits: int, size: int, *, symmetric: bool = True, act_order: bool = False, v2: bool = False
) -> Layout:
    def pack(weight: Tensor) -> Packed | None:
        rows, wide = weight.shape
        group = size if size > 0 else wide
        if wide % group or rows % 8:
            return None
        inputs = torch.arange(wide)
        order = torch.randperm(wide, generator=torch.Generator().manual_seed(wide)) if act_order else inputs
        codes, zero, scale = rounded(weight[:, order], bits, group, symmetric=symmetric)
        back = order.argsort()
        group_of = (inputs // group)[back]
        codes = codes[:, back]
        stored = {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": words((zero - int(not v2)).T, bits),
            "scales": scale.T.contiguous(),
            "g_idx": group_of.int(),
        }
        return stored, floats(codes, zero, scale, group_of)

    settings: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric}
    settings |= {"desc_act": act_order, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    return Layout(settings, pack)


def awq(size: int) -> Layout:
    def pack(weight: Tensor) -> Packed | None:
        rows, wide = weight.shape
        if wide % size or rows % 8:
            return None
        codes, zero, scale = rounded(weight, 4, size, symmetric=False)
        places = (0, 2, 4, 6, 1, 3, 5, 7)
        stored = {
            "qweight": words(codes.T, 4, places),
            "qzeros": words(zero.T, 4, places),
            "scales": scale.T.contiguous(),
        }
        return stored, floats(codes, zero, scale, torch.arange(wide) // size)

    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    return Layout({**settings, "modules_to_not_convert": None}, pack)


def pack_quantized(bits: int, size: int, *, symmetric: bool) -> Layout:
    def pack(weight: Tensor) -> Packed | None:
        from compressed_tensors.compressors import pack_to_int32

        rows, wide = weight.shape
        if wide % size:
            return None
        codes, zero, scale = rounded(weight, bits, size, symmetric=symmetric)
        middle = 2 ** (bits - 1)
        stored = {
            "weight_packed": pack_to_int32((codes - middle).to(torch.int8), bits),
            "weight_scale": scale.bfloat16(),
            "weight_shape": torch.tensor([rows, wide]),
        }
        if not symmetric:
            stored["weight_zero_point"] = pack_to_int32((zero - middle).to(torch.int8), bits, packed_dim=0)
        return stored, floats(codes, zero, scale.bfloat16(), torch.arange(wide) // size)

    weights = {
        "num_bits": bits,
        "group_size": size,
        "strategy": "group",
        "symmetric": symmetric,
        "type": "int",
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return Layout({**settings, "ignore": ["lm_head", "re:visual.*"]}, pack)


def int_quantized() -> Layout:
    def pack(weight: Tensor) -> Packed:
        codes, zero, scale = rounded(weight, 8, -1, symmetric=True)
        stored = {"weight": (codes - 128).to(torch.int8), "weight_scale": scale.bfloat16()}
        return stored, floats(codes, zero, scale.bfloat16(), torch.zeros(weight.shape[1], dtype=torch.int64))

    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel", "type": "int"}}
    }
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    return Layout(settings, pack, tower=True)


def float8(method: str) -> Layout:
    def pack(weight: Tensor) -> Packed:
        if method == "fp8":
            tall, broad = -(-weight.shape[0] // 32), -(-weight.shape[1] // 32)
            scale = torch.rand(tall, broad, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.01
            wide = scale.repeat_interleave(32, 0)[: len(weight)].repeat_interleave(32, 1)[
                :, : weight.shape[1]
            ]
            codes = (weight / wide).to(torch.float8_e4m3fn)
            return {"weight": codes, "weight_scale_inv": scale}, codes.float() * wide
        scale = weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale

    more = {"weight_block_size": [32, 32]} if method == "fp8" else {"format": "float-quantized"}
    return Layout({"quant_method": method, **more}, pack)


def nf4(*, nested: bool) -> Layout:
    def pack(weight: Tensor) -> Packed:
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(
            weight.bfloat16(), blocksize=64, compress_statistics=nested, quant_type="nf4"
        )
        state.dtype = torch.float32
        stored = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        # Its own dequantize_4bit is wrong on a CPU where a block runs on from one row into the next.
        scales = state.absmax
        if nested:
            scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
        halves = torch.stack((codes.flatten() >> 4, codes.flatten() & 15), 1).flatten()
        plain = state.code[halves.long()].view(-1, 64) * scales.unsqueeze(1)
        return {"weight": codes, **stored}, plain.view(weight.shape)

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return Layout({**settings, "bnb_4bit_use_double_quant": nested}, pack, tower=True)


def llm_int8() -> Layout:
    def pack(weight: Tensor) -> Packed:
        largest = weight.abs().amax(1)
        codes = (weight * (127 / largest).unsqueeze(1)).round().to(torch.int8)
        stored = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return stored, codes.float() * (largest / 127).unsqueeze(1)

    return Layout({"quant_method": "bitsandbytes", "load_in_8bit": True}, pack)


LAYOUTS: Mapping[str, Layout] = {
    "gptq 4": gptq(4, 32),
    "gptq 4 act-order asymmetric": gptq(4, 16, symmetric=False, act_order=True),
    "gptq 4 whole rows act-order": gptq(4, -1, act_order=True),
    "gptq 8 v2": gptq(8, 32, v2=True),
    "awq": awq(32),
    "pack-quantized 4": pack_quantized(4, 32, symmetric=True),
    "pack-quantized 4 asymmetric": pack_quantized(4, 16, symmetric=False),
    "pack-quantized 8": pack_quantized(8, 16, symmetric=True),
    "int-quantized": int_quantized(),
    "float-quantized": float8("compressed-tensors"),
    "fp8": float8("fp8"),
    "nf4": nf4(nested=False),
    "nf4 nested": nf4(nested=True),
    "llm.int8": llm_int8(),
}


def write(family: str, layout: Layout, stored: Path, as_floats: Path) -> int:
    """A recorded checkpoint in a layout, and the same rounded weights as floats; how many modules it has."""
    source = GOLDEN / family / "model"
    tensors = load_file(source / "model.safetensors")
    packed, plain, count = dict(tensors), dict(tensors), 0
    for key, tensor in tensors.items():
        in_tower = re.search(r"visual|vision|vpm", key) is not None
        if tensor.ndim != 2 or not _LAYERS.search(key) or (in_tower and not layout.tower):
            continue
        found = layout.pack(tensor.float())
        if found is None:
            continue
        del packed[key]
        module = key.removesuffix(".weight")
        packed |= {f"{module}.{name}": value.contiguous() for name, value in found[0].items()}
        plain[key] = found[1].contiguous()
        count += 1
    for folder, content in ((stored, packed), (as_floats, plain)):
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        save_file(content, folder / "model.safetensors")
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = dict(layout.settings)
    (stored / "config.json").write_text(json.dumps(config))
    return count
