"""Devices: what they can do, what they are once opened, whether they can be used here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opsin.api.kernels import KVGeometry, KVLayer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a device can do. Configuration is resolved against it; a device never edits the config.

    Attributes:
        dtypes: supported element types.
        dtype_for: ``dtype="auto"``: the checkpoint's dtype -> the dtype to run it in.
        kv_block_size: tokens per KV block.
        max_tensor_elements: upper bound for one tensor of the KV cache, or None.
        kv_memory_share: share of the free memory the KV cache takes by default, for a device with memory of
            its own; None: a cautious share, as of a host that others use too.
        pinned_memory, graphs: optional mechanisms, shown by ``opsin doctor``.
        communication: torch.distributed backend, shown by ``opsin doctor``.
        advice: per unsupported dtype, the sentence that says what to pass instead.
        tolerances: per dtype, the error that the device's own arithmetic is known to make, as a share of the
            largest number: what `opsin.testing.kernels` allows at least. Since 1.2.
        host_angles: sines and cosines of large angles are not precise here: positions stay on the host, and
            `opsin.layers.RotaryTable` computes there. Since 1.2.
    """

    dtypes: tuple[str, ...]
    dtype_for: Mapping[str, str]
    kv_block_size: int = 16
    max_tensor_elements: int | None = None
    kv_memory_share: float | None = None
    pinned_memory: bool = False
    graphs: bool = False
    communication: str = "gloo"
    advice: Mapping[str, str] = field(default_factory=dict)
    tolerances: Mapping[str, float] = field(default_factory=dict)
    host_angles: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryInfo:
    """Bytes of device memory."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Device:
    """An opened device.

    Attributes:
        name: the spec's name.
        torch_device: what tensors are created on, e.g. ``"cpu"``, ``"cuda:0"``.
        capabilities: see there.
        memory: free and total memory now.
        allocate_kv: (num_blocks, block_size, geometry, torch dtype) -> one `KVLayer` per model layer.
            None: core allocates [num_blocks, block_size, K, D].
        kv_row_elements: elements that one token's keys take in one layer of that cache (its values take as
            many), for a device that fills heads up; None: K * D.
        synchronize: wait until queued work is done; None where nothing is queued.
        details: facts for ``opsin doctor`` (threads, driver versions, switches).
        declined: kernels of the device's own that are not used because they do not work here -> why; the
            reference serves in their place. ``opsin doctor`` counts them as faults. Since 1.2.
    """

    name: str
    torch_device: str
    capabilities: Capabilities
    memory: Callable[[], MemoryInfo]
    allocate_kv: Callable[[int, int, KVGeometry, torch.dtype], Sequence[KVLayer]] | None = None
    kv_row_elements: Callable[[KVGeometry], int] | None = None
    synchronize: Callable[[], None] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Whether a device can be used here, and why.

    Attributes:
        score: 0 means unusable; ``device="auto"`` takes the highest.
        reason: one sentence.
        next_step: what to do about it, or empty.
        details: facts for ``opsin doctor``.
    """

    score: int
    reason: str
    next_step: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
