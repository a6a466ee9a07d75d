"""Quantised checkpoints on the simulated card answer as the same rounded weights do that are floats."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.stored_forms import LAYOUTS, write
from tests.models.test_stored_forms import answers, compare


@pytest.mark.parametrize("layout", ["gptq 4", "awq", "pack-quantized 8", "int-quantized", "nf4"])
@pytest.mark.parametrize("family", ["qwen2vl", pytest.param("phi3v", marks=pytest.mark.slow)])
def test_the_card_gives_the_same(tmp_path: Path, family: str, layout: str) -> None:
    write(family, LAYOUTS[layout], tmp_path / "stored", tmp_path / "floats")
    stored = answers(tmp_path / "stored", family, device="mlu")
    compare(stored, answers(tmp_path / "floats", family, device="mlu"))
