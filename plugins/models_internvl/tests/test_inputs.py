"""Pictures cut into tiles, frames chosen, and settings that cannot be used."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import InternVLConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from opsin.api import InputContext, MediaItem
from opsin_models_internvl.config import TEXTS, TOP, VISION, Vision, language_config
from opsin_models_internvl.inputs import ImageMapper, VideoMapper

SIDE = 28
CONFIG: Mapping[str, Any] = {
    "image_seq_length": 1,
    "vision_config": {"image_size": [SIDE, SIDE], "patch_size": [14, 14]},
}
SETTINGS: Mapping[str, Any] = {"size": {"height": SIDE, "width": SIDE}}


def context(
    settings: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
) -> InputContext:
    given = {**SETTINGS, **(settings or {})}
    return InputContext(
        config={**CONFIG, **(config or {})},
        preprocessor=given,
        tokenizer=SimpleNamespace(),  # type: ignore[arg-type]
        video_preprocessor=given,
        read_json=lambda name: (processor or {}) if name == "processor_config.json" else {},
    )


def item(height: int, width: int, seed: int = 0) -> MediaItem:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return MediaItem(modality="image", digest="x", pixels=pixels)


def video(count: int) -> MediaItem:
    pixels = np.zeros((count, 6, 8, 3), np.uint8)
    pixels[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return MediaItem(modality="video", digest="x", pixels=pixels)


def sizes() -> list[tuple[int, int]]:
    chance = random.Random(5)
    found = [(chance.randint(1, 300), chance.randint(1, 300)) for _ in range(120)]
    return [*found, (1, 1), (1, 900), (900, 1), (SIDE, SIDE), (SIDE, 2 * SIDE), (40, 40), (60, 120), (84, 84)]


@pytest.mark.parametrize("bounds", [(1, 12), (1, 1), (2, 6), (4, 4)])
def test_every_size_is_cut_as_transformers_cuts_it(bounds: tuple[int, int]) -> None:
    settings = {"min_patches": bounds[0], "max_patches": bounds[1]}
    mapper = ImageMapper(context(settings))
    theirs = GotOcr2ImageProcessorPil(**SETTINGS, **settings, crop_to_patches=True)
    for number, (height, width) in enumerate(sizes()):
        given = item(height, width, number)
        mapped = mapper.map(given, {})
        made = theirs(given.pixels, return_tensors="pt", input_data_format="channels_last")
        assert torch.equal(mapped.tensors["pixel_values"], made["pixel_values"]), (height, width)
        assert mapped.geometry == int(made["num_patches"][0]) == mapped.num_embeds
        assert mapper.count_embeds(width, height, 1, {}) == mapped.num_embeds


def test_frames_are_chosen_from_the_middle_of_equal_parts() -> None:
    """As transformers' arange from half a part on, in steps of a part."""
    mapper = VideoMapper(context())
    for count, wanted in ((8, 3), (32, 8), (301, 64), (5, 5), (7, 1)):
        step = count / wanted
        expected = torch.arange(step / 2, count, step).int().tolist()
        values = mapper.map(video(min(count, 250)), {"num_frames": wanted}).tensors["pixel_values"]
        if count <= 250:
            levels = mapper.map(video(count), {}).tensors["pixel_values"]
            assert torch.equal(values, levels[expected])
        assert len(values) == wanted == mapper.count_embeds(8, 6, count, {"num_frames": wanted})
    assert mapper.map(video(3), {"num_frames": 9}).geometry == 3
    sampled = VideoMapper(context({"do_sample_frames": True, "num_frames": 2}))
    assert sampled.map(video(9), {}).geometry == 2
    assert VideoMapper(context({"num_frames": 2})).map(video(9), {}).geometry == 9


@pytest.mark.parametrize("make", [ImageMapper, VideoMapper])
def test_embeddings_are_whole_tiles(make: Any) -> None:
    four = {"image_seq_length": 4, "vision_config": {"image_size": 56, "patch_size": 14}}
    mapper = make(context({"size": {"height": 56, "width": 56}}, four))
    [part] = mapper.split_embeds(torch.ones(12, 5))
    mapped = mapper.map(MediaItem(modality="image", digest="x", embeds=part), {})
    assert (mapped.num_embeds, mapped.geometry) == (12, 3)
    with pytest.raises(ValueError, match="multiple of 4"):
        mapper.split_embeds(torch.ones(13, 5))


def vision(**changes: Any) -> Callable[[], Any]:
    return lambda: Vision.from_config({**CONFIG, "vision_config": {**CONFIG["vision_config"], **changes}})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (vision(norm_type="batch_norm"), "norm_type is 'batch_norm'"),
        (vision(use_absolute_position_embeddings=False), "use_absolute_position_embeddings"),
        (vision(image_size=[28, 56]), "two that are equal"),
        (vision(image_size=42, patch_size=14), "downsample_ratio is 0.5"),
        (lambda: Vision.from_config({**CONFIG, "downsample_ratio": 0.3}), "downsample_ratio is 0.3"),
        (lambda: Vision.from_config({**CONFIG, "downsample_ratio": 0.0}), "downsample_ratio is 0.0"),
        (lambda: Vision.from_config({**CONFIG, "image_seq_length": 256}), "image_seq_length is 256"),
        (lambda: Vision.from_config({**CONFIG, "vision_feature_layer": 30}), "24 layers"),
        (lambda: Vision.from_config({**CONFIG, "vision_feature_layer": [-1, -2]}), "vision_feature_layer"),
        (lambda: Vision.from_config({**CONFIG, "vision_feature_select_strategy": "full"}), "'full'"),
        (lambda: ImageMapper(context({"size": {"height": 28, "width": 56}})), "not of one checkpoint"),
        (lambda: ImageMapper(context(processor={"image_seq_length": 9})), "image_seq_length is 9"),
        (lambda: ImageMapper(context({"max_patches": 0})), "max_patches=0"),
        (lambda: ImageMapper(context()).map(item(5, 5), {"max_patches": 500}), "max_patches=500"),
        (lambda: ImageMapper(context()).map(item(5, 5), {"crop_to_patches": 1}), "crop_to_patches=1"),
        (lambda: VideoMapper(context()).map(video(2), {"num_frames": 0}), "num_frames=0"),
        (lambda: language_config({"text_config": {"model_type": "qwen3_moe"}}), "'qwen3_moe'"),
    ],
)
def test_settings_that_cannot_be_used(made: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()


def test_what_config_json_leaves_out_is_the_classes_default() -> None:
    theirs = InternVLConfig()
    for name in VISION:
        assert VISION[name] == getattr(theirs.vision_config, name), name
    for name in TOP.keys() - {"image_token_id"}:
        assert TOP[name] == getattr(theirs, name), name
    assert Vision.from_config({}).image_size == theirs.vision_config.image_size[0] == 448
    assert language_config({})["model_type"] == theirs.text_config.model_type
    assert language_config({})["tie_word_embeddings"]
    assert not language_config({"tie_word_embeddings": False})["tie_word_embeddings"]
    for kind, config in (("llama", LlamaConfig()), ("qwen2", Qwen2Config()), ("qwen3", Qwen3Config())):
        given = language_config({"text_config": {"model_type": kind}})
        for name in TEXTS[kind].keys() - {"use_sliding_window"}:
            assert given[name] == getattr(config, name), (kind, name)
