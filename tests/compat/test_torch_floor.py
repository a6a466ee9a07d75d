"""Core and plugins keep to what the vendor's MLU370 container has: torch 2.5 and Python 3.10."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = (2, 5)
PYTHON = (3, 10)


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torch_names", ROOT / "tools/torch_names.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["torch_names"] = module  # dataclasses and caches look it up
    spec.loader.exec_module(module)
    return module


TOOL = load_tool()
SOURCES = TOOL.sources()


def test_every_name_of_torch_in_use_is_old_enough() -> None:
    used = TOOL.used_names(SOURCES, TOOL.tensor_attributes(Path(torch.__file__).parent))
    listed = TOOL.read_list()
    unknown = sorted(used - set(listed))
    assert not unknown, f"not in tools/torch_names.txt: {unknown}; tools/torch_names.py says how to add them"
    newer = {name: listed[name] for name in used if listed[name] > TORCH}
    assert not newer, f"newer than torch {TORCH}: {newer}"


def test_names_are_found_where_they_are_used(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "import torch\nimport torch.nn.functional as F\nfrom torch import Tensor, nn\n"
        "def f(x: Tensor):\n"
        "    y = F.rms_norm(torch.linalg.norm(x).view(-1)).brand_new()\n"
        "    return nn.Module, y.split(2), torch.ops.aten.add(y, y)\n"
    )
    assert TOOL.used_names([file], {"view", "split", "brand_new"}) == {
        "torch.nn.functional",
        "torch.nn.functional.rms_norm",
        "torch.nn",
        "torch.nn.Module",
        "torch.Tensor",
        "torch.Tensor.view",
        "torch.Tensor.brand_new",
        "torch.linalg",
        "torch.linalg.norm",
        "torch.ops",
    }


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_syntax_is_python_3_10(file: Path) -> None:
    ast.parse(file.read_text(), feature_version=PYTHON)


def test_metadata_promises_the_same() -> None:
    files = [ROOT / "core/pyproject.toml", *sorted((ROOT / "plugins").glob("*/pyproject.toml"))]
    for file in files:
        text = file.read_text()
        assert f'requires-python = ">={PYTHON[0]}.{PYTHON[1]}"' in text, file
        for floor in re.findall(r'"torch>=([\d.]+)', text):
            assert tuple(map(int, floor.split("."))) == TORCH, file
