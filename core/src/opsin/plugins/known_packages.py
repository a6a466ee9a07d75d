"""Which package provides an architecture, a device or a checkpoint, for messages that say what to install.

The names are in ``data/known_packages.json``: the core's code knows no family and no chip.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path


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
    weight_formats: Mapping[str, str]
    checkpoints: Mapping[str, KnownCheckpoint]


def pip_install(*packages: str) -> str:
    """The command that installs packages of this release: out of a checkout, since they are on no index."""
    paths = []
    for package in packages:
        name = package.removeprefix("opsin-").replace("-", "_")
        paths.append(
            f"plugins/{name}"
            if name.startswith(("device_", "models_", "weight_"))
            else f"demo/checkpoints/{name}"
        )
    root = Path(__file__).resolve().parents[4]
    if not all((root / path).is_dir() for path in paths):
        return f"pip install {' '.join(f'./{path}' for path in paths)} (in a checkout of opsin)"
    if root != Path.cwd():
        return f"pip install {' '.join(str(root / path) for path in paths)}"
    return f"pip install {' '.join(f'./{path}' for path in paths)}"


@cache
def known_packages() -> KnownPackages:
    """The packages that belong to this release."""
    data = json.loads(files("opsin").joinpath("data/known_packages.json").read_text(encoding="utf-8"))
    data["checkpoints"] = {name: KnownCheckpoint(**entry) for name, entry in data["checkpoints"].items()}
    return KnownPackages(**data)
