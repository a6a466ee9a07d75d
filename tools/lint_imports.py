"""Checks who may import whom: three sets of contracts, and that no modules import each other in a circle.

The core's contracts stand in the top-level pyproject.toml. What discovery loads is a set of its own, the only
one that leaves out imports for typing (an option of a whole set). A plugin's contracts are the same for all,
so they are made here from the folders under plugins/: adding a plugin edits no file outside its own folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]
OPEN_TO_PLUGINS = {"api", "layers", "testing"}
"""Modules of the core that a plugin may import, besides ``from opsin import hookimpl``."""

DISCOVERY = ["opsin.api", "opsin.config", "opsin.errors", "opsin.hookspecs", "opsin.plugins"]
"""What is imported before anybody has chosen a model."""


def core_modules() -> list[str]:
    """Names of the core's top-level modules and packages."""
    entries = (ROOT / "core/src/opsin").iterdir()
    names = (e.stem for e in entries if e.suffix == ".py" or (e / "__init__.py").exists())
    return sorted(set(names) - {"__init__"})


def plugin_packages() -> list[str]:
    """Import names of all plugins in the workspace."""
    return sorted(init.parent.name for init in (ROOT / "plugins").glob("*/src/*/__init__.py"))


def configuration(packages: Sequence[str], contracts: Sequence[str], **options: bool) -> str:
    """One set of contracts as TOML."""
    lines = ["[tool.importlinter]", f"root_packages = {json.dumps(packages)}"]
    lines += [f"{option} = {json.dumps(value)}" for option, value in options.items()]
    return "\n".join([*lines, "", *contracts])


def forbidden(name: str, sources: Sequence[str], modules: Sequence[str], *, indirect: bool = False) -> str:
    """A contract as TOML: the sources import none of the modules, ``indirect``: directly."""
    return (
        "[[tool.importlinter.contracts]]\n"
        f"name = {json.dumps(name)}\n"
        'type = "forbidden"\n'
        f"source_modules = {json.dumps(sources)}\n"
        f"forbidden_modules = {json.dumps(modules)}\n"
        f"allow_indirect_imports = {json.dumps(indirect)}\n"
    )


def discovery_contracts() -> str:
    """What is imported when plugins are discovered."""
    light = forbidden(
        "Discovering plugins loads neither torch nor transformers", DISCOVERY, ["torch", "transformers"]
    )
    return configuration(
        ["opsin"], [light], include_external_packages=True, exclude_type_checking_imports=True
    )


def plugin_contracts() -> str:
    """The core apart from the plugins, and each plugin apart from the core's insides and the others."""
    plugins = plugin_packages()
    closed = [f"opsin.{name}" for name in core_modules() if name not in OPEN_TO_PLUGINS]
    contracts = [forbidden("The core imports no plugin", ["opsin"], plugins)]
    for plugin in plugins:
        others = [other for other in plugins if other != plugin]
        contracts.append(
            forbidden(f"{plugin} uses only the core's public modules", [plugin], closed, indirect=True)
        )
        if others:
            contracts.append(forbidden(f"{plugin} imports no other plugin", [plugin], others))
    return configuration(["opsin", *plugins], contracts)


def circle() -> Sequence[str]:
    """Modules of the core that import each other, for typing or to run; empty if there are none.

    The layers compare a package's members; this compares modules, a package's own ``__init__`` among them.
    """
    graph = grimp.build_graph("opsin", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found: Sequence[str] = error.args[1]
        return found[::-1]
    return ()


def main() -> int:
    """Run everything; returns the exit status."""
    configurations = [(ROOT / "pyproject.toml").read_text(), discovery_contracts()]
    if plugin_packages():
        configurations.append(plugin_contracts())
    broken = False
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(configurations):
            config = Path(folder) / str(number) / "pyproject.toml"
            config.parent.mkdir()
            config.write_text(text)
            broken |= lint_imports(config_filename=str(config), no_cache=True, no_logo=True) != 0
    found = circle()
    print("Circle: " + " imports ".join(found) if found else "No module imports itself through others.")
    return int(broken or bool(found))


if __name__ == "__main__":
    sys.exit(main())
