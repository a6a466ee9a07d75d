"""The family through opsin's contract suite, on a tiny checkpoint made by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from opsin.testing.models import (
    ModelCase,
    ModelCheck,
    ModelUnderTest,
    check_model,
    compare_with_transformers,
    make_images,
    model_checks,
    tiny_checkpoint,
)

PAD = "<|image_pad|>"
IMAGE = f"<|vision_start|>{PAD}<|vision_end|>"
TOKENS = {
    "image_token_id": PAD,
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
UNREAD = {
    "vision_start_token_id": "the placeholder's text has the mark",
    "vision_end_token_id": "the placeholder's text has the mark",
    "max_window_layers": "with use_sliding_window only; the context then ends with the window",
    "sliding_window": "where the window is off",
    "use_sliding_window": "without a window",
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelUnderTest]:
    folder = tiny_checkpoint(
        "Qwen2VLForConditionalGeneration",
        tmp_path_factory.mktemp("model"),
        tokens=TOKENS,
        changes={"text_config": {"rope_parameters": ROPE}, "tie_word_embeddings": request.param},
    )
    with ModelUnderTest(folder, unread=UNREAD) as under_test:
        yield under_test


@pytest.mark.parametrize("check", model_checks(), ids=str)
def test_contract(check: ModelCheck, model: ModelUnderTest) -> None:
    assert check_model(check, model).applies


def test_it_is_transformers(model: ModelUnderTest) -> None:
    """transformers' whole processor needs torchvision for videos: its image processor is asked instead."""
    images = Qwen2VLImageProcessorPil.from_pretrained(model.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(model.checkpoint)

    def inputs(case: ModelCase) -> Mapping[str, Any]:
        found = dict(images(images=list(case.images), return_tensors="pt")) if case.images else {}
        text = case.text
        for grid in found.get("image_grid_thw", ()):
            text = text.replace(PAD, "{}" * (int(grid.prod()) // 4), 1)
        ids = torch.tensor([tokenizer.encode(text.replace("{}", PAD))])
        kinds = (ids == tokenizer.convert_tokens_to_ids(PAD)).long()
        return {**found, "input_ids": ids, "mm_token_type_ids": kinds}

    one, two, three, _ = make_images()
    cases = [
        ModelCase(text="Hello, what a day"),
        ModelCase(text=f"{IMAGE} what is it?", images=[one]),
        ModelCase(text=f"{IMAGE}{IMAGE} and {IMAGE}: which?", images=[one, two, three]),
    ]
    compare_with_transformers(model.checkpoint, cases, inputs=inputs)
