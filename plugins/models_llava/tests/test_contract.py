"""Both architectures through opsin's contract suite, on tiny checkpoints made by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import LlavaNextProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

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

SIDE, PATCH = 70, 14
SQUARE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "LlavaForConditionalGeneration": (LlavaProcessor, CLIPImageProcessorPil(**SQUARE), {}),
    "LlavaNextForConditionalGeneration": (
        LlavaNextProcessor,
        LlavaNextImageProcessorPil(**SQUARE, image_grid_pinpoints=PINPOINTS),
        {"image_grid_pinpoints": PINPOINTS},
    ),
}
UNREAD = {
    "image_seq_length": "the tower and the grid decide",
    "vision_config.projection_dim": "of CLIP's head over both towers, which is not stored",
    "vision_config.vocab_size": "of CLIP's text tower",
    "image_token": "config.json has its id",
    "num_additional_image_tokens": "the tower decides",
    "processor_config.json/patch_size": "the tower's counts",
    "vision_feature_select_strategy": "of the processor: config.json's counts",
    "do_pad": "pads the crops of a batch, which has none",
    "do_resize": "all crops have the tower's size",
}


@pytest.fixture(scope="module", params=KINDS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelUnderTest]:
    kind, images, changes = KINDS[request.param]

    def processor(tokenizer: Any) -> Any:
        return kind(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )

    folder = tiny_checkpoint(
        request.param,
        tmp_path_factory.mktemp("model"),
        tokens={"image_token_index": "<image>"},
        changes={**changes, "vision_config": {"patch_size": PATCH, "image_size": SIDE}},
        processor=processor,
    )
    with ModelUnderTest(folder, unread=UNREAD) as under_test:
        yield under_test


@pytest.mark.parametrize("check", model_checks(), ids=str)
def test_contract(check: ModelCheck, model: ModelUnderTest) -> None:
    assert check_model(check, model).applies


def test_it_is_transformers(model: ModelUnderTest) -> None:
    one, two, three, _ = make_images()
    cases = [
        ModelCase(text="Hello, what a day"),
        ModelCase(text="<image>\nwhat is it?", images=[one]),
        ModelCase(text="<image><image> and <image>: which?", images=[one, two, three]),
    ]
    compare_with_transformers(model.checkpoint, cases)
