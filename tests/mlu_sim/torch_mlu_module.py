"""The fake ``torch_mlu`` and its ``torch.mlu``: what torch_mlu 1.24 has, without graphs."""

from __future__ import annotations

import os
import types
from contextlib import nullcontext
from typing import Any

import torch

from tests.mlu_sim.card import CARD

VERSION = "1.24.1"


class _Current:
    index = 0


def _index(device: Any = None) -> int:
    """A device argument -> its index."""
    if device is None:
        return _Current.index
    if isinstance(device, int):
        index = device
    else:
        found = torch.device(device).index
        index = _Current.index if found is None else found
    if not 0 <= index < device_count():
        raise RuntimeError(f"invalid device ordinal {index}: {device_count()} MLU devices are visible")
    return index


def visible_devices() -> str | None:
    """The variable that rules, by its value: CN_, then MLU_, then CUDA_VISIBLE_DEVICES."""
    names = ("CN_VISIBLE_DEVICES", "MLU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    return next((os.environ[name] for name in names if name in os.environ), None)


def device_count() -> int:
    """Visible devices."""
    visible = visible_devices()
    if visible is None:
        return CARD.num_devices
    wanted = [part for part in visible.split(",") if part.strip().isdecimal()]
    return sum(int(part) < CARD.num_devices for part in wanted)


class _Properties:
    def __init__(self) -> None:
        self.name, self.major, self.minor = CARD.name, CARD.major, CARD.minor
        self.isa_version, self.total_memory = CARD.isa_version, CARD.total_memory
        self.multi_processor_count, self.cluster_count, self.core_num_per_cluster = 16, 4, 4
        self.supports_linear_memory = False


def get_device_properties(device: Any = None) -> _Properties:
    """Of one device."""
    _index(device)
    return _Properties()


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes."""
    return CARD.total_memory - CARD.allocated[_index(device)], CARD.total_memory


def set_device(device: Any) -> None:
    """Make a device the current one."""
    _Current.index = _index(device)


class Stream:
    """The one queue: everything is done when its call returns."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def make() -> types.ModuleType:
    """``torch_mlu.mlu``, which becomes ``torch.mlu``."""
    module = types.ModuleType("torch_mlu.mlu")
    functions: dict[str, Any] = {
        "_is_in_bad_fork": lambda: False,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "is_available": lambda: device_count() > 0,
        "device_count": device_count,
        "current_device": lambda: _Current.index,
        "set_device": set_device,
        "device": lambda device: nullcontext(_index(device)),
        "synchronize": lambda device=None: None,
        "get_device_properties": get_device_properties,
        "get_device_name": lambda device=None: get_device_properties(device).name,
        "get_device_capability": lambda device=None: (CARD.major, CARD.minor),
        "is_bf16_supported": lambda: CARD.major >= 5,
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda device=None: CARD.allocated[_index(device)],
        "max_memory_allocated": lambda device=None: CARD.peak[_index(device)],
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "get_amp_supported_dtype": lambda: [torch.float16],
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module
