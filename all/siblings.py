"""What opsin-all needs: all packages of this repository, by path while it is installed from a clone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PLUGINS = (
    "device-cpu",
    "device-mlu",
    "models-internvl",
    "models-llava",
    "models-minicpmv",
    "models-phi3v",
    "models-qwen2vl",
    "models-qwen25vl",
    "models-qwen3vl",
    "models-smolvlm",
    "weight-formats",
)
DEMO = ("tiny-llava", "tiny-minicpmv", "tiny-phi3v", "tiny-qwen2vl")
EXTRAS = ("batch", "plot", "ray", "video")
"""Of the core; opsin-all hands them on."""


class Siblings(MetadataHookInterface):
    """Dependencies as direct references to the folders beside this one.

    Where those are missing (a source distribution), or `OPSIN_RELEASE` is set (`make dist`), they are named
    with this version instead: a file's address has no meaning on another machine.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        repository, version = Path(self.root).parent, metadata["version"]
        in_clone = (repository / "core/pyproject.toml").is_file() and not os.environ.get("OPSIN_RELEASE")

        def needed(name: str, group: str, extra: str = "") -> str:
            folder = f"{group}/{name.removeprefix('opsin-')}".replace("-", "_") if group else "core"
            where = f" @ {(repository / folder).as_uri()}" if in_clone else f"=={version}"
            return f"{name}{extra}{where}"

        metadata["dependencies"] = [
            needed("opsin", ""),  # without it pip looks for what plugins need before it knows of the folder
            needed("opsin", "", "[serve]"),
            *(needed(f"opsin-{name}", "plugins") for name in PLUGINS),
        ]
        metadata["optional-dependencies"] = {
            "demo": [needed(f"opsin-{name}", "demo/checkpoints") for name in DEMO],
            **{extra: [needed("opsin", "", f"[{extra}]")] for extra in EXTRAS},
        }
