"""The torch-free door: what this plugin registers. Everything heavy is imported by the builders."""

from __future__ import annotations

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


def _from(module: str, op: OpName) -> Callable[[], Callable[..., Any]]:
    """Loads the kernel that stands in a module under the op's name."""

    def load() -> Callable[..., Any]:
        kernel: Callable[..., Any] = getattr(import_module(f"opsin_device_cpu.{module}"), op)
        return kernel

    return load


def _prepare_linear() -> Callable[..., Any]:
    from opsin_device_cpu.device import copy_bytes, has_bfloat16_instructions, threads
    from opsin_device_cpu.half import Float16Copies
    from opsin_device_cpu.linear import LinearPreparer

    copies = Float16Copies(copy_bytes(), threads()[0])
    return LinearPreparer(copies, bfloat16_instructions=has_bfloat16_instructions())


def _supports(query: KernelQuery) -> bool:
    from opsin_device_cpu.device import DTYPES

    return query.dtype in DTYPES


def _supports_quantized(query: KernelQuery) -> bool:
    from opsin_device_cpu.quantized import supports

    return _supports(query) and supports(query)


@hookimpl
def opsin_register_devices() -> Sequence[DeviceSpec]:
    return [DeviceSpec(name=NAME, torch_type="cpu", probe=_probe, open=_open)]


@hookimpl
def opsin_register_kernels() -> Sequence[KernelSpec]:
    homes: dict[str, tuple[OpName, ...]] = {
        "kernels": ("rms_norm", "layer_norm", "gated_act", "rotary"),
        "attention": ("plan_attention", "write_kv", "paged_attention", "dense_attention"),
        "search": ("top_k",),
    }
    loaders = {op: _from(module, op) for module, ops in homes.items() for op in ops}
    loaders["prepare_linear"] = _prepare_linear
    return [
        *(KernelSpec(device=NAME, op=op, load=load, supports=_supports) for op, load in loaders.items()),
        KernelSpec(
            device=NAME,
            op="prepare_quantized_linear",
            load=_from("quantized", "prepare_quantized_linear"),
            supports=_supports_quantized,
        ),
    ]
