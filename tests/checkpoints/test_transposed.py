"""A weight that lies on its side has the right number of elements, and is refused all the same."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from opsin import LLM
from opsin.errors import CheckpointError
from tests.models.families import FAMILIES
from tests.models.golden import GOLDEN


def kinds(family: str) -> dict[str, str]:
    """For each kind of matrix that is no square one tensor's name; layers are of one kind."""
    [file] = (GOLDEN / family / "model").glob("*.safetensors")
    tensors = load_file(file)
    lying = [key for key, t in tensors.items() if t.ndim >= 2 and t.shape[0] != t.shape[1]]
    return {re.sub(r"\.\d+\.", ".N.", key): key for key in reversed(lying)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_transposed_weight_is_refused_by_name(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / family / "model", folder)
    [file] = folder.glob("*.safetensors")
    tensors, tried = load_file(file), kinds(family)
    assert len(tried) >= 5
    for key in tried.values():
        turned = tensors | {key: tensors[key].transpose(0, 1).contiguous()}
        save_file(turned, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=re.escape(key)):
            LLM(str(folder), kv_cache_memory=2**22)
