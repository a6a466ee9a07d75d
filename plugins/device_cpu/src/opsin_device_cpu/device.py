"""The CPU: what it can do, how many threads to use, how much memory there is."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch

from opsin.api import Capabilities, Device, KVGeometry, KVLayer, MemoryInfo, Probe
from opsin_device_cpu import limits, native
from opsin_device_cpu.allocator import keep_freed_memory

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")

KV_BLOCK_SIZE = 16

COPY_SHARE = 8
"""One part in so many of all memory may hold float16 copies of weights."""


def has_bfloat16_instructions() -> bool:
    """Whether matrix products in bfloat16 run on instructions made for them."""
    return bool(limits.cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def capabilities() -> Capabilities:
    """float32 always; bfloat16 checkpoints stay bfloat16 only where the instructions are there.

    Without them a bfloat16 product is several times slower than a float32 one (numbers in
    docs/decisions/0022-cpu-dtypes.md), so ``auto`` widens.
    """
    bfloat16 = "bfloat16" if has_bfloat16_instructions() else "float32"
    return Capabilities(
        dtypes=DTYPES,
        dtype_for={"float32": "float32", "bfloat16": bfloat16, "float16": bfloat16},
        kv_block_size=KV_BLOCK_SIZE,
        advice={"float16": 'pass dtype="float32" (or "bfloat16" for half the memory)'},
    )


def threads() -> tuple[int, str]:
    """How many threads to use, and why."""
    for name in ("OPSIN_CPU_THREADS", "OMP_NUM_THREADS"):
        # OMP_NUM_THREADS may be a list, one number per nesting level
        text = os.environ.get(name, "").split(",")[0].strip()
        if text:
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"{name}={os.environ[name]!r}: expected a whole number, at least 1")
            return int(text), name
    return limits.usable_cores(), "cores this process may use"


def copy_bytes() -> int:
    """How much memory an engine may spend on second copies of weights: see `opsin_device_cpu.linear`."""
    text = os.environ.get("OPSIN_CPU_COPY_BYTES", "").strip()
    if not text:
        return memory().total_bytes // COPY_SHARE
    if not text.isdecimal():
        raise ValueError(f"OPSIN_CPU_COPY_BYTES={text!r}: expected a whole number of bytes, 0 for no copies")
    return int(text)


def memory() -> MemoryInfo:
    """Of the machine, or of the container if its limit is lower."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    container = limits.container_memory()
    if container is not None:
        total = min(total, container.total_bytes)
        free = min(free, container.free_bytes)
    return MemoryInfo(free_bytes=free, total_bytes=total)


def _details() -> Mapping[str, Any]:
    count, reason = threads()
    known = memory()
    return {
        "processor": limits.processor_name() or platform.processor() or platform.machine(),
        "threads": f"{count} ({reason})",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 instructions": has_bfloat16_instructions(),
        "native kernels": native.loaded().reason,
        "oneDNN": torch.backends.mkldnn.is_available(),
        "memory": f"{known.free_bytes / 2**30:.1f} GiB free of {known.total_bytes / 2**30:.1f} GiB",
        "torch": torch.__version__,
    }


def probe() -> Probe:
    """The CPU is always there; any accelerator goes before it."""
    try:
        details = _details()
    except ValueError as error:
        return Probe(score=0, reason=str(error), next_step="correct or unset the variable")
    return Probe(score=1, reason=f"{details['processor']}, {details['threads']} threads", details=details)


def _allocator_of_kv() -> Callable[[int, int, KVGeometry, torch.dtype], Sequence[KVLayer]]:
    """The layout of those kernels that will read it."""
    if native.library() is None:
        from opsin_device_cpu import attention

        return attention.allocate_kv
    from opsin_device_cpu.compiled import attention as compiled

    return compiled.allocate_kv


def open_device(index: int) -> Device:
    """Set torch's thread count and the allocator's habits, and describe the device.

    Raises:
        ValueError: there is no CPU with that index, or a thread variable is not a number.
    """
    if index != 0:
        raise ValueError(f'device "cpu:{index}": there is one CPU device; pass device="cpu"')
    torch.set_num_threads(threads()[0])
    native.set_threads(threads()[0])
    logger.info("native kernels: %s", native.loaded().reason)
    kept = keep_freed_memory()
    return Device(
        name="cpu",
        torch_device="cpu",
        capabilities=capabilities(),
        memory=memory,
        allocate_kv=_allocator_of_kv(),
        details={**_details(), "allocator keeps freed memory": kept},
    )
