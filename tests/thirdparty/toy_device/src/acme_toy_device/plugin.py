"""The torch-free door: the first day of a new device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opsin import hookimpl
from opsin.api import Capabilities, Device, DeviceSpec, KernelQuery, KernelSpec, MemoryInfo, Probe


def _probe() -> Probe:
    return Probe(score=50, reason="an imaginary chip", details={"revision": "A0"})


def _open(index: int) -> Device:
    return Device(
        name="toychip",
        torch_device="cpu",
        capabilities=Capabilities(
            dtypes=("float32",), dtype_for={"bfloat16": "float32", "float16": "float32"}, kv_block_size=4
        ),
        memory=lambda: MemoryInfo(free_bytes=64 * 2**20, total_bytes=64 * 2**20),
    )


def _rms_norm() -> Callable[..., Any]:
    from acme_toy_device.kernels import rms_norm

    return rms_norm


def _supports(query: KernelQuery) -> bool:
    return query.dtype == "float32"


@hookimpl
def opsin_register_devices() -> Sequence[DeviceSpec]:
    return [DeviceSpec(name="toychip", torch_type="cpu", probe=_probe, open=_open)]


@hookimpl
def opsin_register_kernels() -> Sequence[KernelSpec]:
    return [KernelSpec(device="toychip", op="rms_norm", load=_rms_norm, supports=_supports)]
