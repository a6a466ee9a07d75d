"""Which package provides an architecture, a device or a checkpoint, for messages that say what to install.

The names are in ``data/known_packages.json``: the core's code knows no family and no chip.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, kw_only=True)
class KnownCheckpoint:
    """A checkpoint that comes as a package: the package, and the architecture it needs."""

    package: str
    architecture: str


@dataclass(frozen=True, kw_only=True)
class KnownPackages:
    """Distributions by what they provide."""

    architectures: Mapping[str, str]
    devices: Mapping[str, str]
    checkpoints: Mapping[str, KnownCheckpoint]


@cache
def known_packages() -> KnownPackages:
    """The packages that belong to this release."""
    data = json.loads(files("opsin").joinpath("data/known_packages.json").read_text(encoding="utf-8"))
    data["checkpoints"] = {name: KnownCheckpoint(**entry) for name, entry in data["checkpoints"].items()}
    return KnownPackages(**data)
