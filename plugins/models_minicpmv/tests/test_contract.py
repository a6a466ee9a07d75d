"""The three versions through opsin's contract suite, on the recorded tiny checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.testing.models import ModelCheck, ModelUnderTest, check_model, model_checks

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
QUERIES = 16
"""Of the recorded checkpoints."""

_SLICING = "preprocessor_config.json goes first"
UNREAD = {
    "_note_tiny": "a remark",
    "batch_vision_input": "how the hub's code makes its batches",
    "config.json/max_slice_nums": _SLICING,
    "config.json/patch_size": _SLICING,
    "config.json/scale_resolution": _SLICING,
    "config.json/slice_mode": _SLICING,
    "config.json/use_image_id": _SLICING,
    "slice_config.max_slice_nums": _SLICING,
    "slice_config.patch_size": _SLICING,
    "slice_config.scale_resolution": _SLICING,
    "config.json/image_size": "scale_resolution decides",
    "max_window_layers": "with use_sliding_window only",
    "mm_use_im_start_end": "the marks are always there, as in the hub's code",
    "sliding_window": "where the window is off",
    "use_sliding_window": "without a window",
    "preprocessor_config.json/version": "of the processor",
    "vision_batch_size": "how the hub's code makes its batches",
    "vision_encoder": "names one tower for all values that are known",
}
VIDEOS = {"minicpmv26"}


def embeds_input(modality: str, embeds: Sequence[torch.Tensor], geometries: Sequence[Any]) -> Any:
    rows = [part.unflatten(0, (-1, QUERIES)) for part in embeds]
    sizes = [size for geometry in geometries for size in geometry.sizes]
    names = ("image_embeds", "image_sizes") if modality == "image" else ("video_embeds", "video_image_sizes")
    if modality == "video" and len(embeds) > 1:
        return [embeds_input(modality, [e], [g]) for e, g in zip(embeds, geometries)]
    return {names[0]: torch.cat(rows), names[1]: sizes}


@pytest.fixture(scope="module", params=["minicpmv20", "minicpmv25", "minicpmv26"])
def model(request: pytest.FixtureRequest) -> Iterator[ModelUnderTest]:
    folder = GOLDEN / request.param / "model"
    with ModelUnderTest(
        folder, unread=UNREAD, embeds_input=embeds_input, trust_remote_code=True
    ) as under_test:
        assert ("video" in under_test.modalities) == (request.param in VIDEOS)
        yield under_test


@pytest.mark.parametrize("check", model_checks(), ids=str)
def test_contract(check: ModelCheck, model: ModelUnderTest) -> None:
    assert check_model(check, model).applies
