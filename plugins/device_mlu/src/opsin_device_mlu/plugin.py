"""The torch-free door: what this plugin registers. Everything heavy is imported by the builders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opsin import hookimpl
from opsin.api import Device, DeviceSpec, KernelQuery, KernelSpec, OpName, Probe

NAME = "mlu"

OPS: tuple[OpName, ...] = (
    "rms_norm",
    "layer_norm",
    "gated_act",
    "rotary",
    "plan_attention",
    "write_kv",
    "paged_attention",
    "dense_attention",
    "prepare_linear",
    "prepare_quantized_linear",
)


def _probe() -> Probe:
    from opsin_device_mlu.device import probe

    return probe()


def _open(index: int) -> Device:
    from opsin_device_mlu.device import open_device

    return open_device(index)


def _report() -> Mapping[str, str | bytes]:
    from opsin_device_mlu.report import files

    return files()


def _load(op: OpName) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        from opsin_device_mlu.kernels import load

        return load(op)

    return load


def _supports(query: KernelQuery) -> bool:
    from opsin_device_mlu.kernels import supports

    return supports(query)


@hookimpl
def opsin_register_devices() -> Sequence[DeviceSpec]:
    return [DeviceSpec(name=NAME, torch_type="mlu", probe=_probe, open=_open, report=_report)]


@hookimpl
def opsin_register_kernels() -> Sequence[KernelSpec]:
    return [KernelSpec(device=NAME, op=op, load=_load(op), supports=_supports) for op in OPS]
