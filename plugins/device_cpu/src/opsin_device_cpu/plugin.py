"""The torch-free door: what this plugin registers. Everything heavy is imported by the builders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from opsin import hookimpl
from opsin.api import Device, DeviceSpec, KernelQuery, KernelSpec, OpName, Probe

NAME = "cpu"


def _probe() -> Probe:
    from opsin_device_cpu.device import probe

    return probe()


def _open(index: int) -> Device:
    from opsin_device_cpu.device import open_device

    return open_device(index)


def _from(module: str, op: str, compiled: str | None = None) -> Callable[[], Callable[..., Any]]:
    """Loads the kernel that stands in a module under a name; in ``compiled`` if the library is there."""

    def load() -> Callable[..., Any]:
        from opsin_device_cpu import native

        home = module if compiled is None or native.library() is None else compiled
        kernel: Callable[..., Any] = getattr(import_module(f"opsin_device_cpu.{home}"), op)
        return kernel

    return load


def _prepare_linear() -> Callable[..., Any]:
    from opsin_device_cpu.device import copy_bytes, has_bfloat16_instructions, threads
    from opsin_device_cpu.half import Float16Copies
    from opsin_device_cpu.linear import LinearPreparer

    copies = Float16Copies(copy_bytes(), threads()[0])
    return LinearPreparer(copies, bfloat16_instructions=has_bfloat16_instructions())


def _prepare_quantized_linear() -> Callable[..., Any]:
    from opsin_device_cpu import quantized
    from opsin_device_cpu.compiled import products

    def prepare(weight: Any, *args: Any, **options: Any) -> Any:
        compiled = products.serves(weight.form, weight.in_features)
        return (products if compiled else quantized).prepare_quantized_linear(weight, *args, **options)

    return prepare


def _supports(query: KernelQuery) -> bool:
    from opsin_device_cpu.device import DTYPES

    return query.dtype in DTYPES


def _supports_linear(query: KernelQuery) -> bool:
    """Weights of 16 bits are read as they are by the compiled kernels."""
    from opsin_device_cpu.compiled import products

    return _supports(query) and (query.weight is None or products.serves(query.weight, query.in_features))


def _supports_quantized(query: KernelQuery) -> bool:
    from opsin_device_cpu import quantized
    from opsin_device_cpu.compiled import products

    form = query.weight
    assert form is not None
    return _supports(query) and (products.serves(form, query.in_features) or quantized.supports(query))


def _supports_attention(query: KernelQuery) -> bool:
    """The compiled kernels have an upper limit of head sizes."""
    from opsin_device_cpu import native

    if native.library() is None:
        return _supports(query)
    from opsin_device_cpu.compiled.attention import MAX_HEAD_SIZE

    return _supports(query) and (query.head_size or 0) <= MAX_HEAD_SIZE


def _supports_fused(query: KernelQuery) -> bool:
    from opsin_device_cpu import native

    return native.library() is not None and _supports_attention(query)


def _supports_ranks(query: KernelQuery) -> bool:
    """Memory that processes share is the compiled kernels' way; torch.distributed's gloo is the other."""
    from opsin_device_cpu import native

    shares = hasattr(os, "memfd_create")
    return shares and native.library() is not None and _supports(query)


@hookimpl
def opsin_register_devices() -> Sequence[DeviceSpec]:
    return [DeviceSpec(name=NAME, torch_type="cpu", probe=_probe, open=_open)]


@hookimpl
def opsin_register_kernels() -> Sequence[KernelSpec]:
    ranks: tuple[OpName, ...] = ("all_reduce", "all_gather")
    elementwise: tuple[OpName, ...] = ("rms_norm", "layer_norm", "gated_act")
    attention: tuple[OpName, ...] = ("plan_attention", "write_kv", "paged_attention", "dense_attention")
    loaders = {op: _from("kernels", op, "compiled.elementwise") for op in elementwise}
    loaders |= {op: _from("attention", op, "compiled.attention") for op in attention}
    loaders["rotary"] = _from("kernels", "rotary", "compiled.attention")
    loaders["rotary_paged_attention"] = _from("compiled.attention", "rotary_paged_attention")
    loaders |= {op: _from("compiled.ranks", op) for op in ranks}
    loaders["top_k"] = _from("search", "top_k")
    loaders["prepare_quantized_linear"] = _prepare_quantized_linear
    supports = dict.fromkeys([*attention, "rotary"], _supports_attention)
    supports |= dict.fromkeys(ranks, _supports_ranks)
    supports["rotary_paged_attention"] = _supports_fused
    supports["prepare_quantized_linear"] = _supports_quantized
    linear = KernelSpec(
        device=NAME,
        op="prepare_linear",
        load=_prepare_linear,
        supports=_supports_linear,
        weights=("float16", "bfloat16"),
        load_narrow=_from("compiled.products", "prepare_narrow_linear"),
    )
    rest = (
        KernelSpec(device=NAME, op=op, load=load, supports=supports.get(op, _supports))
        for op, load in loaders.items()
    )
    return [linear, *rest]
