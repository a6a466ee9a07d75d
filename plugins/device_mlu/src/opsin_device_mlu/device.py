"""MLU cards: whether one can be used here and why not, what it can do, how much memory there is."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from opsin.api import Capabilities, Device, KVGeometry, KVLayer, MemoryInfo, Probe
from opsin_device_mlu.attention import allocate_kv, kv_head_size
from opsin_device_mlu.measured import Measured, measured
from opsin_device_mlu.ops import PACKAGE, Ops, find_ops, version_numbers
from opsin_device_mlu.settings import Settings

SCORE, SCORE_WITHOUT_OPS = 100, 50

_DECISIVE = ("paged_attention", "write_kv", "linear in")
"""Kernels without which a card crawls."""

KV_BLOCK_SIZE = 16
"""The only block size paged flash_attention is documented for."""

MAX_TENSOR_ELEMENTS = 2**31 - 1
"""The vendor's tests skip larger tensors on the 300 series."""

KV_MEMORY_SHARE = 0.7
"""Of what is free once the weights are loaded. The rest is for activations and the encoder's outputs: about
1 GiB for a 7B model at 2,048 tokens and 8,192 picture embeddings a step."""

BFLOAT16_MAJOR = 5
"""Capability from which torch_mlu calls bfloat16 supported; an MLU370 is 3."""

_ANGLE_ERROR = 2e-3
"""A step of float16 just below 1 is 5e-4."""

FLOAT32_ERROR = 3e-3
"""What the vendor's own tests allow a float32 product."""

GUIDE = "docs/devices/mlu370.md"

KNOWN_STACKS = {("2.5", "1.24", "1.3")}
"""(torch, torch_mlu, torch_mlu_ops) that the vendor ships together for the MLU370."""

_VISIBLE = ("CN_VISIBLE_DEVICES", "MLU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
"""Variables that torch_mlu looks at; the first that is set rules, even the one of CUDA."""


class Unusable(Exception):
    """No MLU can be used here.

    Attributes:
        reason, next_step: as in `opsin.api.Probe`.
    """

    def __init__(self, reason: str, next_step: str) -> None:
        super().__init__(f"{reason}; {next_step}")
        self.reason, self.next_step = reason, next_step


def backend() -> Any:
    """``torch.mlu``, which exists once torch_mlu is imported: nothing imports it by itself.

    Raises:
        Unusable: there is no driver, no library or no card.
    """
    try:
        importlib.import_module("torch_mlu")
    except ModuleNotFoundError as error:
        if error.name == "torch_mlu":
            raise Unusable(
                "torch_mlu is not installed",
                f"it is on no public registry: run in Cambricon's container for the MLU370, see {GUIDE}",
            ) from error
        raise _broken(error) from error
    except Exception as error:  # a driver or a library that is absent raises whatever it likes
        raise _broken(error) from error
    module = torch.get_device_module("mlu")
    if module.device_count() == 0 or not module.is_available():
        variable = visible_devices_variable()
        if variable is None:
            raise Unusable(
                "torch_mlu sees no device",
                "check the driver with cnmon, and that /dev/cambricon_dev* is there",
            )
        raise Unusable(
            f"torch_mlu sees no device: {variable}={os.environ[variable]!r} rules which are visible",
            f"correct or unset {variable}",
        )
    return module


def _broken(error: Exception) -> Unusable:
    return Unusable(
        f"torch_mlu cannot be imported: {type(error).__name__}: {error}",
        "check the driver with cnmon, and that torch_mlu was built for this torch; in a container pass the "
        "card's devices through (/dev/cambricon_ctl, /dev/cambricon_dev0, ...)",
    )


def visible_devices_variable() -> str | None:
    """The variable that says which cards are visible, if any does."""
    return next((name for name in _VISIBLE if name in os.environ), None)


def current() -> tuple[str, str] | None:
    """Torch's name and the vendor's name of the current card; None: torch_mlu is not in use."""
    if "torch_mlu" not in sys.modules:
        return None
    try:
        module = backend()
    except Unusable:
        return None
    index = module.current_device()
    return f"mlu:{index}", module.get_device_properties(index).name


def known_kernels(module: Any, index: int, settings: Settings, ops: Ops) -> Measured:
    """What is right on a card, tried now where it has not been before."""
    found = measured(ops, settings, f"mlu:{index}", module.get_device_properties(index).name)
    before = module.current_device()
    module.set_device(index)  # the vendor's kernels launch on the current device
    try:
        sizes = sorted({kv_head_size(size, settings.head_sizes) for size in (64, 128)})
        found.all([torch.float16], [size for size in sizes if size in settings.head_sizes])
    finally:
        if before < module.device_count():
            module.set_device(before)
    return found


def probe() -> Probe:
    """Never raises."""
    try:
        module = backend()
    except Unusable as error:
        return Probe(score=0, reason=error.reason, next_step=error.next_step)
    try:
        settings = Settings.read()
    except ValueError as error:
        return Probe(score=0, reason=str(error), next_step="correct or unset the variable")
    ops = find_ops(settings)
    count = module.device_count()
    cards = f"{count} × {module.get_device_properties(0).name}"
    if ops.missing:
        reason = f"{cards}; {ops.missing}: everything runs on the reference kernels, slowly"
        step = "" if not settings.ops else f"install {PACKAGE} as the vendor's container has it: see {GUIDE}"
        details = describe(module, 0, settings, ops, None)
        return Probe(score=SCORE_WITHOUT_OPS, reason=reason, next_step=step, details=details)
    found = known_kernels(module, 0, settings, ops)
    details = describe(module, 0, settings, ops, found)
    slow = [name for name in found.declined if name.startswith(_DECISIVE)]
    if found.declined:
        reason = f"{cards}; {len(found.declined)} kernels of {PACKAGE} are not used"
        if slow:
            reason += f", among them {', '.join(slow)}: slow"
        step = "; ".join(f"{name}: {why}" for name, why in found.declined.items())
        return Probe(
            score=SCORE_WITHOUT_OPS if slow else SCORE, reason=reason, next_step=step, details=details
        )
    return Probe(score=SCORE, reason=f"{cards}, {PACKAGE} {ops.version}", details=details)


def describe(
    module: Any, index: int, settings: Settings, ops: Ops, found: Measured | None
) -> Mapping[str, Any]:
    """Facts for ``opsin doctor``."""
    properties = module.get_device_properties(index)
    free, total = module.mem_get_info(index)
    variable = visible_devices_variable()
    torch_mlu = importlib.import_module("torch_mlu")
    stack = (torch.__version__, getattr(torch_mlu, "__version__", None), ops.version)
    known = tuple(".".join(map(str, version_numbers(version)[:2])) for version in stack) in KNOWN_STACKS
    declined = {} if found is None else found.declined
    return {
        "card": f"{properties.name}, capability {properties.major}.{properties.minor}",
        "devices": f"{module.device_count()}" + (f" ({variable}={os.environ[variable]})" if variable else ""),
        "memory": f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB",
        "torch": stack[0],
        "torch_mlu": stack[1] or "does not tell its version",
        PACKAGE: ops.missing or ops.version or "does not tell its version",
        "stack": "the vendor's for the MLU370"
        if known
        else "not one this plugin was written for: run `opsin doctor --device mlu --selftest`",
        "rotary tables": "on the card" if exact_angles(index) else "on the host: its sines are not precise",
        "kernels not used": "; ".join(f"{name}: {why}" for name, why in declined.items()) or "none",
        **({} if found is None else {f"  {name}": how for name, how in sorted(found.notes.items())}),
        "head sizes": ", ".join(map(str, settings.head_sizes)),
        "switches": ", ".join(f"{name}={value}" for name, value in settings.changed().items())
        or "all at their defaults",
    }


def capabilities(module: Any, index: int, settings: Settings) -> Capabilities:
    """float16 unless asked otherwise: float32 takes twice the memory and a third of the speed."""
    properties = module.get_device_properties(index)
    bfloat16 = properties.major >= BFLOAT16_MAJOR
    dtypes = ("float16", "float32", *(("bfloat16",) if bfloat16 else ()))
    return Capabilities(
        dtypes=dtypes,
        dtype_for={
            "float32": "float16",
            "float16": "float16",
            "bfloat16": "bfloat16" if bfloat16 else "float16",
        },
        kv_block_size=KV_BLOCK_SIZE,
        max_tensor_elements=MAX_TENSOR_ELEMENTS,
        kv_memory_share=KV_MEMORY_SHARE,
        pinned_memory=_has_pinned_memory() if settings.pinned_memory is None else settings.pinned_memory,
        graphs=settings.graphs,
        communication="cncl",
        tolerances={"float32": FLOAT32_ERROR},
        host_angles=not exact_angles(index),
        advice={
            "bfloat16": f"{properties.name} (capability {properties.major}.{properties.minor}) does not "
            'compute in it; pass dtype="float16" (a bfloat16 checkpoint is cast while it is loaded), or, if '
            'float16 overflows, dtype="float32": much slower, as the vendor\'s norms, rotary positions and '
            "KV cache take no float32"
        },
    )


def open_device(index: int) -> Device:
    """Make a card the current one and describe it.

    Raises:
        ValueError: there is no such card, or a switch is set to what cannot be.
    """
    try:
        module = backend()
    except Unusable as error:
        raise ValueError(f'device "mlu:{index}": {error}') from error
    settings = Settings.read()
    count = module.device_count()
    if not 0 <= index < count:
        variable = visible_devices_variable()
        ruled = f" ({variable}={os.environ[variable]})" if variable else ""
        raise ValueError(
            f'device "mlu:{index}": {count} visible{ruled}; pass device="mlu:0"'
            + (f' to "mlu:{count - 1}"' if count > 1 else "")
        )
    ops = find_ops(settings)
    module.set_device(index)  # the vendor's kernels launch on the current device
    found = None if ops.missing else known_kernels(module, index, settings, ops)
    name = f"mlu:{index}"
    return Device(
        name="mlu",
        torch_device=name,
        capabilities=capabilities(module, index, settings),
        memory=partial(_memory, module, index),
        allocate_kv=partial(_allocate_kv, name, settings.head_sizes),
        kv_row_elements=lambda geometry: (
            geometry.num_kv_heads * kv_head_size(geometry.head_size, settings.head_sizes)
        ),
        synchronize=partial(module.synchronize, index),
        details=describe(module, index, settings, ops, found),
        declined={} if found is None else found.declined,
    )


@lru_cache(maxsize=16)
def exact_angles(index: int) -> bool:
    """Whether sines and cosines of positions up to 30,000 are right on a card.

    The vendor tests them on [-2 pi, 2 pi] only; nobody says how larger angles are reduced.
    """
    angles = torch.tensor([1.0, 1_000.0, 30_000.0])[:, None] * 10_000.0 ** -(torch.arange(16) / 16)
    try:
        there = angles.to(f"mlu:{index}")
        errors = [
            (function(there).to("cpu") - function(angles)).abs().max().item()
            for function in (torch.cos, torch.sin)
        ]
    except Exception:  # whatever a card raises
        return False
    return max(errors) <= _ANGLE_ERROR


def _has_pinned_memory() -> bool:
    try:
        return torch.empty(1, pin_memory=True).is_pinned()
    except Exception:  # whatever a backend without it raises
        return False


def _memory(module: Any, index: int) -> MemoryInfo:
    free, total = module.mem_get_info(index)
    return MemoryInfo(free_bytes=free, total_bytes=total)


def _allocate_kv(
    device: str,
    head_sizes: Sequence[int],
    num_blocks: int,
    block_size: int,
    geometry: KVGeometry,
    dtype: torch.dtype,
) -> Sequence[KVLayer]:
    return allocate_kv(num_blocks, block_size, geometry, dtype, device=device, head_sizes=head_sizes)
