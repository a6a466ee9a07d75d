"""Checks who may import whom: the core's contracts, and one pair of contracts for every plugin folder.

The core's contracts stand in the top-level pyproject.toml. A plugin's are the same for all, so they are
made here from the folders under plugins/: adding a plugin edits no file outside its own folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]
OPEN_TO_PLUGINS = {"api", "layers", "testing"}
"""Modules of the core that a plugin may import, besides ``from opsin import hookimpl``."""


def core_modules() -> list[str]:
    """Names of the core's top-level modules and packages."""
    entries = (ROOT / "core/src/opsin").iterdir()
    names = (e.stem for e in entries if e.suffix == ".py" or (e / "__init__.py").exists())
    return sorted(set(names) - {"__init__"})


def plugin_packages() -> list[str]:
    """Import names of all plugins in the workspace."""
    return sorted(init.parent.name for init in (ROOT / "plugins").glob("*/src/*/__init__.py"))


def contract(name: str, sources: list[str], forbidden: list[str], *, indirect: bool) -> str:
    """One import-linter contract as TOML."""
    return (
        "[[tool.importlinter.contracts]]\n"
        f"name = {json.dumps(name)}\n"
        'type = "forbidden"\n'
        f"source_modules = {json.dumps(sources)}\n"
        f"forbidden_modules = {json.dumps(forbidden)}\n"
        f"allow_indirect_imports = {json.dumps(indirect)}\n"
    )


def plugin_contracts() -> str:
    """The plugins' contracts as an import-linter configuration."""
    plugins = plugin_packages()
    closed = [f"opsin.{name}" for name in core_modules() if name not in OPEN_TO_PLUGINS]
    parts = [
        "[tool.importlinter]\n"
        f"root_packages = {json.dumps(['opsin', *plugins])}\n"
        "exclude_type_checking_imports = true\n",
        contract("The core imports no plugin", ["opsin"], plugins, indirect=False),
    ]
    for plugin in plugins:
        others = [other for other in plugins if other != plugin]
        parts.append(
            contract(f"{plugin} uses only the core's public modules", [plugin], closed, indirect=True)
        )
        if others:
            parts.append(contract(f"{plugin} imports no other plugin", [plugin], others, indirect=False))
    return "\n".join(parts)


def main() -> int:
    """Run both sets of contracts; returns the exit status."""
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    if plugin_packages():
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "pyproject.toml"
            config.write_text(plugin_contracts())
            status = status or lint_imports(config_filename=str(config), no_cache=True, no_logo=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
