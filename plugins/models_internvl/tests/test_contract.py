"""The family through opsin's contract suite, on the recorded tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.testing.models import ModelCheck, ModelUnderTest, check_model, model_checks

FOLDER = Path(__file__).parents[3] / "tests" / "golden" / "internvl" / "model"
UNREAD = {
    "text_config.max_window_layers": "with use_sliding_window only",
    "text_config.use_sliding_window": "without a window",
    "vision_config.hidden_dropout_prob": "training",
    "vision_config.layer_scale_init_value": "training: what the layers' factors began as",
    "vision_config.use_mask_token": "training: of patches that are masked",
    "crop_to_patches": "transformers' processor always says that pictures are cut",
    "preprocessor_config.json/do_resize": "tiles always have the tower's size",
}


def embeds_input(modality: str, embeds: Sequence[torch.Tensor], geometries: Sequence[Any]) -> Any:
    """Rows of each item."""
    del geometries
    return {f"{modality}_embeds": list(embeds)}


@pytest.fixture(scope="module")
def model() -> Iterator[ModelUnderTest]:
    with ModelUnderTest(FOLDER, unread=UNREAD, embeds_input=embeds_input, num_requests=48) as under_test:
        yield under_test


@pytest.mark.parametrize("check", model_checks(), ids=str)
def test_contract(check: ModelCheck, model: ModelUnderTest) -> None:
    assert check_model(check, model).applies
