"""Which names of torch the packages use, and since which version torch has them.

The packages promise to run with torch 2.5: it is what Cambricon's container for the MLU370 has. Development
happens with a newer one, where a newer name would go unnoticed. So every name in use stands in
torch_names.txt with the first version known to have it, and `tests/compat` compares. To add names:

    pip download torch==2.5.0 --no-deps --only-binary=:all: --python-version 3.10 \\
        --platform manylinux2014_aarch64
    python tools/torch_names.py torch-2.5.0*.whl [older and newer wheels ...] > tools/torch_names.txt

(The wheels for aarch64 are small. They are read, not installed.) Names under ``torch.ops`` are left out: no
stub lists them, and only device_cpu uses any. What cannot be seen here: arguments that are newer than their
function.
"""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".txt")
UNLISTED = "torch.ops."


def sources() -> list[Path]:
    """The packages' code."""
    folders = [ROOT / "core/src", *(ROOT / "plugins").glob("*/src")]
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def used_names(files: Iterable[Path], tensor_attributes: Iterable[str]) -> set[str]:
    """Names reached from an import of torch, and attributes that may be a tensor's.

    Args:
        files: sources.
        tensor_attributes: of the torch at hand. An attribute of anything that is called like one of these
            counts as ``torch.Tensor.<name>``, unless a string or a container of Python has it as well.
    """
    plain = {name for kind in (str, list, tuple, dict, set) for name in dir(kind)}
    known = frozenset(tensor_attributes) - plain
    found: set[str] = set()
    for file in files:
        tree = ast.parse(file.read_text())
        aliases = dict(_imports(tree))
        found |= {name for name in aliases.values() if "." in name}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            if node.attr in known:
                found.add(f"torch.Tensor.{node.attr}")
            name = _dotted(node, aliases)
            if name is not None:
                found.add(name)
    return {name for name in found if not name.startswith(UNLISTED) and "__" not in name}


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local name -> what of torch it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield alias.asname or "torch", alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *reversed(parts)])


class Wheel:
    """A torch wheel, whose sources and stubs say which names it has."""

    def __init__(self, file: Path) -> None:
        self._archive = zipfile.ZipFile(file)
        self._files = frozenset(self._archive.namelist())
        match = re.search(r"torch-(\d+)\.(\d+)", file.name)
        assert match is not None, f"{file.name}: expected the name of a torch wheel"
        self.version = int(match[1]), int(match[2])
        self._names: dict[str, frozenset[str]] = {}

    def has(self, name: str) -> bool:
        """Whether a dotted name is there."""
        if name.startswith("torch.Tensor."):
            return name.removeprefix("torch.Tensor.") in self._tensor_attributes
        module, _, attribute = name.rpartition(".")
        if not module:
            return True
        if self._is_module(name):
            return True
        if self._is_module(module):
            return attribute in self._names_of(module)
        # An attribute of a class or an enum: torch.Generator.manual_seed. The class has to do.
        return self.has(module)

    def _is_module(self, module: str) -> bool:
        base = module.replace(".", "/")
        return bool({f"{base}.py", f"{base}/__init__.py", f"{base}/__init__.pyi"} & self._files)

    def _parse(self, module: str) -> Iterator[ast.Module]:
        base = module.replace(".", "/")
        for file in (f"{base}.py", f"{base}.pyi", f"{base}/__init__.py", f"{base}/__init__.pyi"):
            if file in self._files:
                yield ast.parse(self._archive.read(file))

    def _names_of(self, module: str) -> frozenset[str]:
        if module not in self._names:
            self._names[module] = frozenset()  # star imports may go round
            self._names[module] = frozenset(
                name for tree in self._parse(module) for name in self._defined(tree, module)
            )
        return self._names[module]

    def _defined(self, tree: ast.Module, module: str) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                yield node.value  # __all__, and names that are set by their text
            elif isinstance(node, ast.ImportFrom):
                package = module if node.level <= 1 else module.rpartition(".")[0]
                origin = f"{package}.{node.module}" if node.level else node.module or ""
                for alias in node.names:
                    if alias.name == "*":
                        yield from self._names_of(origin)
                    else:
                        yield alias.asname or alias.name

    @cached_property
    def _tensor_attributes(self) -> frozenset[str]:
        trees = [tree for module in ("torch._C", "torch._tensor") for tree in self._parse(module)]
        return frozenset(name for tree in trees for name in _tensor_members(tree))


def _tensor_members(tree: ast.Module) -> Iterator[str]:
    """Methods and properties of the tensor class in a source or stub."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in ("_TensorBase", "TensorBase", "Tensor"):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield member.name
                elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    yield member.target.id


def tensor_attributes(torch_folder: Path) -> set[str]:
    """Of the tensors of an installed torch, as its stubs have them."""
    files = [torch_folder / "_C/__init__.pyi", torch_folder / "_tensor.py"]
    return {name for file in files for name in _tensor_members(ast.parse(file.read_text()))}


def read_list() -> dict[str, tuple[int, int]]:
    """Name -> first version known to have it."""
    lines = (line.split() for line in LIST.read_text().splitlines() if line and not line.startswith("#"))
    return {name: (int(version.split(".")[0]), int(version.split(".")[1])) for name, version in lines}


def main(files: list[str]) -> None:
    """Print the list, as the given wheels have it."""
    import torch

    wheels = sorted((Wheel(Path(file)) for file in files), key=lambda wheel: wheel.version)
    oldest = ".".join(map(str, wheels[0].version))
    print(f"# First version known to have each name; {oldest} is the oldest looked at. See torch_names.py.")
    for name in sorted(used_names(sources(), tensor_attributes(Path(torch.__file__).parent))):
        first = next((wheel.version for wheel in wheels if wheel.has(name)), None)
        if first is None:
            sys.exit(f"{name}: in none of the wheels")
        print(name, ".".join(map(str, first)))


if __name__ == "__main__":
    main(sys.argv[1:])
