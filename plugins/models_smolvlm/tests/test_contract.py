"""The family through opsin's contract suite, on the recorded tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.testing.models import ModelCheck, ModelUnderTest, check_model, model_checks

FOLDER = Path(__file__).parents[3] / "tests" / "golden" / "smolvlm" / "model"
UNREAD = {
    "_pad_token_id": "nothing is padded",
    "preprocessor_config.json/do_pad": "frames of a batch, which has none",
    "video_sampling.fps": "of videos whose times are known",
    "video_sampling.max_frames": "of videos whose times are known",
}


def embeds_input(modality: str, embeds: Sequence[torch.Tensor], geometries: Sequence[Any]) -> Any:
    """Rows of each item and, of pictures, how they were split."""
    if modality == "video":
        return {"video_embeds": list(embeds)}
    rows, columns = zip(*((squares.rows, squares.columns) for squares in geometries))
    return {"image_embeds": list(embeds), "rows": list(rows), "cols": list(columns)}


@pytest.fixture(scope="module")
def model() -> Iterator[ModelUnderTest]:
    with ModelUnderTest(FOLDER, unread=UNREAD, embeds_input=embeds_input, num_requests=48) as under_test:
        yield under_test


@pytest.mark.parametrize("check", model_checks(), ids=str)
def test_contract(check: ModelCheck, model: ModelUnderTest) -> None:
    assert check_model(check, model).applies
