"""The six hooks of opsin.

pluggy runs at start-up only: each hook is called once per `load_plugins`, returns specs, and is never on
the path of a request. Every hook is optional; a plugin implements those it has something for.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from opsin.api import (
    DeviceSpec,
    InputMapperSpec,
    KernelSpec,
    ModelSpec,
    PlaceholderSpec,
    WeightFormatSpec,
)

PROJECT = "opsin"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def opsin_register_models() -> Sequence[ModelSpec]:
    """Architectures this plugin can build. Called once at start-up. Since 1.0.

    Returns:
        One `ModelSpec` per architecture; building happens later, only for the model that is loaded.
    """
    raise AssertionError("a hook specification is never called")


@hookspec
def opsin_register_input_mappers() -> Sequence[InputMapperSpec]:
    """How media become model tensors, one spec per (architecture, modality). Since 1.0."""
    raise AssertionError("a hook specification is never called")


@hookspec
def opsin_register_placeholders() -> Sequence[PlaceholderSpec]:
    """How media are written in a prompt and expanded, one spec per (architecture, modality). Since 1.0."""
    raise AssertionError("a hook specification is never called")


@hookspec
def opsin_register_devices() -> Sequence[DeviceSpec]:
    """Devices this plugin can open. Probing and opening happen later. Since 1.0."""
    raise AssertionError("a hook specification is never called")


@hookspec
def opsin_register_kernels() -> Sequence[KernelSpec]:
    """Ops this plugin implements for a device, its own or another plugin's. Since 1.0."""
    raise AssertionError("a hook specification is never called")


@hookspec
def opsin_register_weight_formats() -> Sequence[WeightFormatSpec]:
    """How methods of quantisation store weights, one spec per method. Since 1.2."""
    raise AssertionError("a hook specification is never called")
