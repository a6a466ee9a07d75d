"""Our InternVL against transformers', on checkpoints of several layouts with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import LLM
from tests.models.golden import picture
from tests.models.made.compare import compare
from tests.models.made.internvl import InternVL
from tests.models.made.smolvlm import frames_of

PICTURES = [picture(f"{name}.png") for name in ("coffee_320x213", "rocket_400x80", "cat_150x240")]
UNTIED = {"tie_word_embeddings": False}
LARGE_TOWER = {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}

LAYOUTS: dict[str, dict[str, Any]] = {
    "qwen2, tied": {},
    "qwen2 in a file of transformers' keys": {"own_keys": True, "text": {"rope_parameters": DYNAMIC}},
    "qwen3": {"text": {"model_type": "qwen3", "head_dim": 24, **UNTIED}, "changes": UNTIED},
    "llama, and a tower as the 6B has it": {
        "text": {"model_type": "llama", "rms_norm_eps": 1e-5, **UNTIED},
        "vision": LARGE_TOWER,
        "changes": UNTIED,
        "own_keys": True,
    },
    "a norm behind the tower": {"vision": {"use_mean_pooling": False}, "settings": {"resample": 2}},
    "read at the last layer but one": {
        "vision": {"use_mean_pooling": False, "use_mask_token": True},
        "changes": {"vision_feature_layer": -2},
        "settings": {"min_patches": 2, "max_patches": 5},
    },
}
TEXTS = {
    "text alone": ("Hello, what a day", 0),
    "one": ("<|im_start|>user\n<IMG_CONTEXT>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", 1),
    "several": ("<IMG_CONTEXT><IMG_CONTEXT> and\n<IMG_CONTEXT>: which?", 3),
}
VIDEOS: dict[str, tuple[str, list[Any], int]] = {
    "one": ("<|im_start|>user\n<video>\nWhat happens?", [frames_of(PICTURES)], 0),
    "words around it": ("What?<video>Tell me", [frames_of(PICTURES)], 0),
    "two, and a picture": (
        "See <video>, <IMG_CONTEXT>\n<video>",
        [frames_of(PICTURES), frames_of(PICTURES[:1])],
        1,
    ),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = InternVL(folder, **LAYOUTS[request.param])
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**23) as llm:
        assert not llm.engine.executor.weights.unexpected
        yield llm, theirs


@pytest.mark.parametrize("text", TEXTS)
def test_pictures(pair: tuple[LLM, InternVL], text: str) -> None:
    prompt, count = TEXTS[text]
    compare(*pair, prompt, {"image": PICTURES[:count]})


@pytest.mark.parametrize("option", [{"crop_to_patches": False}, {"min_patches": 3, "max_patches": 4}])
def test_options(pair: tuple[LLM, InternVL], option: dict[str, Any]) -> None:
    compare(*pair, "<IMG_CONTEXT> or <IMG_CONTEXT>?", {"image": PICTURES[:2]}, **option)


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(pair: tuple[LLM, InternVL], name: str) -> None:
    prompt, videos, count = VIDEOS[name]
    compare(*pair, prompt, {"video": videos, "image": PICTURES[:count]})


def test_the_tower_is_transformers(tmp_path: Path) -> None:
    theirs = InternVL(tmp_path)
    prompt = "<IMG_CONTEXT><IMG_CONTEXT>"
    inputs = theirs.inputs(prompt, {"image": PICTURES[:2]})
    with torch.inference_mode():
        expected = theirs.model.model.get_image_features(**inputs.media).pooler_output.flatten(0, 1)
    with LLM(str(tmp_path), dtype="float32", kv_cache_memory=2**23) as llm:
        given = {"prompt": prompt, "multi_modal_data": {"image": PICTURES[:2]}}
        media = llm.engine.frontend.processor.process(given).media
        with torch.inference_mode():
            ours = llm.engine.executor.model.encode("image", [item.mapped for item in media])
    assert float((torch.cat(list(ours)) - expected).abs().max()) < 1e-5
