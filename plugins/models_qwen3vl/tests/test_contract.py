"""The family through opsin's contract suite, on the recorded tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.testing.models import ModelCheck, ModelUnderTest, check_model, model_checks

FOLDER = Path(__file__).parents[3] / "tests" / "golden" / "qwen3vl" / "model"
UNREAD = {
    "vision_start_token_id": "the placeholder's text has the mark",
    "vision_end_token_id": "the placeholder's text has the mark",
}


def embeds_input(modality: str, embeds: Sequence[torch.Tensor], geometries: Sequence[Any]) -> Any:
    """Rows of all items, their grids, and for videos their times."""
    grids = [getattr(geometry, "grid", geometry) for geometry in geometries]
    data = {f"{modality}_embeds": torch.cat(list(embeds)), f"{modality}_grid_thw": torch.tensor(grids)}
    if modality == "video":
        data["timestamps"] = [geometry.times for geometry in geometries]
    return data


@pytest.fixture(scope="module")
def model() -> Iterator[ModelUnderTest]:
    with ModelUnderTest(FOLDER, unread=UNREAD, embeds_input=embeds_input, num_requests=48) as under_test:
        yield under_test


@pytest.mark.parametrize("check", model_checks(), ids=str)
def test_contract(check: ModelCheck, model: ModelUnderTest) -> None:
    assert check_model(check, model).applies
