"""What an engine needs of a Ray node, and its settings once it is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray

from opsin.config import EngineConfig
from opsin.ray.chips import take_chips

HOST_DEVICES = ("auto", "cpu")
"""Devices for which Ray counts cores only."""


def actor_options(config: EngineConfig, cpus: float | None) -> dict[str, Any]:
    """What Ray reserves for an engine: cores, and a resource with the device's name in capitals."""
    name = config.device.partition(":")[0]
    ranks = config.tensor_parallel_size
    options: dict[str, Any] = {"num_cpus": cpus if cpus is not None else ranks}
    if name not in HOST_DEVICES:
        options["resources"] = {name.upper(): ranks}
    return options


def settled(config: EngineConfig) -> EngineConfig:
    """The settings of an engine in this process, which Ray has placed: with chips of its own."""
    name, _, index = config.device.partition(":")
    if name in HOST_DEVICES or index:
        return config
    node = ray.get_runtime_context().get_node_id()
    resources = next(known["Resources"] for known in ray.nodes() if known["NodeID"] == node)
    first = take_chips(name, config.tensor_parallel_size, int(resources.get(name.upper(), 0)))
    return replace(config, device=f"{name}:{first}")
