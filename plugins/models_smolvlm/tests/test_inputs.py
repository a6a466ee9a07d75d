"""Pictures cut into squares, frames chosen, what they are written as, and settings that cannot be used."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Idefics3Config, LlamaConfig, SmolVLMConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

from opsin.api import InputContext, MediaItem
from opsin_models_smolvlm.config import VISION, Vision, language_config
from opsin_models_smolvlm.inputs import ImageMapper, VideoMapper
from opsin_models_smolvlm.model import fractional_positions
from opsin_models_smolvlm.prompts import Clip, Squares, image_text, in_words, video_text
from opsin_models_smolvlm.sampling import Sampling

CONFIG: Mapping[str, Any] = {
    "scale_factor": 4,
    "image_token_id": 7,
    "vision_config": {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16},
    "text_config": {"model_type": "llama"},
}
"""As SmolVLM-256M has it: a square of 512 pixels becomes 64 embeddings."""
SETTINGS: Mapping[str, Any] = {
    "size": {"longest_edge": 2048},
    "max_image_size": {"longest_edge": 512},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def context(
    settings: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    video: Mapping[str, Any] | None = None,
) -> InputContext:
    given = {**SETTINGS, **(settings or {})}
    return InputContext(
        config={**CONFIG, **(config or {})},
        preprocessor=given,
        tokenizer=SimpleNamespace(),  # type: ignore[arg-type]
        video_preprocessor=given if video is None else video,
        read_json=lambda name: (processor or {}) if name == "processor_config.json" else {},
    )


def item(height: int, width: int, seed: int = 0) -> MediaItem:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return MediaItem(modality="image", digest="x", pixels=pixels)


def video(count: int, times: tuple[float, ...] | None = None) -> MediaItem:
    pixels = np.zeros((count, 6, 8, 3), np.uint8)
    pixels[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return MediaItem(modality="video", digest="x", pixels=pixels, times=times)


# ---- pictures ------------------------------------------------------------------------------------


def sizes() -> list[tuple[int, int]]:
    chance = random.Random(3)
    found = [(chance.randint(1, 900), chance.randint(1, 900)) for _ in range(60)]
    return [
        *found,
        (1, 1),
        (1, 900),
        (900, 1),
        (512, 512),
        (2048, 2048),
        (512, 2048),
        (4096, 11),
        (300, 3000),
    ]


@pytest.mark.parametrize("edge", [64, 100, 128, 256])
def test_every_size_is_cut_as_transformers_cuts_it(edge: int) -> None:
    settings = {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": 64}}
    config = {"vision_config": {**CONFIG["vision_config"], "image_size": 64}}
    mapper = ImageMapper(context(settings, config))
    theirs = Idefics3ImageProcessorPil(**{**SETTINGS, **settings})
    for number, (height, width) in enumerate(sizes()):
        given = item(height, width, number)
        mapped = mapper.map(given, {})
        made = theirs(
            given.pixels, return_tensors="pt", return_row_col_info=True, input_data_format="channels_last"
        )
        assert (mapped.geometry.rows, mapped.geometry.columns) == (made["rows"][0][0], made["cols"][0][0])
        assert torch.equal(mapped.tensors["pixel_values"], made["pixel_values"][0]), (height, width)
        assert mapper.count_embeds(width, height, 1, {}) == mapped.num_embeds
        assert mapped.num_embeds == len(made["pixel_values"][0])  # one embedding for each of these squares


def test_no_picture_is_resized_beyond_4096() -> None:
    mapper = ImageMapper(context({"size": {"longest_edge": 6000}}))
    assert mapper.map(item(60, 90), {}).geometry == Squares(6, 8, 64)


@pytest.mark.parametrize("side", [4, 7, 16, 19, 25, 26, 27, 32, 40])
def test_positions_are_transformers_rounding_errors_included(side: int) -> None:
    """19 patches on 19 rows: some fall on a neighbour's row. With the published 26, 27 and 32 none does."""
    config: Any = SimpleNamespace(
        hidden_size=1, image_size=side, patch_size=1, num_channels=3, num_attention_heads=1
    )
    theirs = Idefics3VisionEmbeddings(config)
    theirs.patch_embedding.weight.data.zero_()
    assert theirs.patch_embedding.bias is not None
    theirs.patch_embedding.bias.data.zero_()
    theirs.position_embedding.weight.data[:, 0] = torch.arange(side * side)
    for count in (side, 1, 2, side + 3, 2 * side):
        with torch.inference_mode():
            mask = torch.ones(1, count, count, dtype=torch.bool)
            expected = theirs(torch.zeros(1, 3, count, count), mask).flatten().long()
        along = fractional_positions(count, side)
        assert torch.equal((along[:, None] * side + along).flatten(), expected), count
    if side in (26, 27, 32):
        assert fractional_positions(side, side).tolist() == list(range(side))


# ---- videos --------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 4, 64])
@pytest.mark.parametrize("target", [0.5, 1, 2])
def test_frames_are_chosen_as_transformers_chooses_them(most: int, target: float) -> None:
    sampling = Sampling(fps=target, num_frames=most)
    for fps in (1.0, 2.0, 7.5, 24.0, 29.97, 30.0):
        for count in (1, 2, 3, 7, 24, 60, 150, 301):
            metadata = VideoMetadata(total_num_frames=count, fps=fps, duration=count / fps)
            chooser: Any = SimpleNamespace(num_frames=most, fps=target)
            expected = SmolVLMVideoProcessor.sample_frames(chooser, metadata)
            times = [number / fps for number in range(count)]
            assert list(sampling.chosen(times)) == list(expected), (fps, count)


def test_frames_without_times_are_all_taken() -> None:
    settings = {"video_sampling": {"fps": 1, "max_frames": 2, "video_size": {"longest_edge": 512}}}
    mapper = VideoMapper(context(settings))
    assert mapper.map(video(5), {}).num_embeds == 5 * 64
    assert mapper.map(video(5, (0.0, 1.0, 2.0, 3.0, 4.0)), {}).num_embeds == 2 * 64
    assert mapper.map(video(5, (0.0, 1.0, 2.0, 3.0, 4.0)), {"num_frames": 3}).num_embeds == 3 * 64
    assert mapper.count_embeds(8, 6, 5, {}) <= 2 * 64, (
        "an item that may be sampled is not refused by its length"
    )
    assert VideoMapper(context()).count_embeds(8, 6, 5, {}) == 5 * 64


def test_settings_of_transformers_5_say_the_same() -> None:
    newer = VideoMapper(context(video={**SETTINGS, "fps": 1, "num_frames": 2}))
    clip = newer.map(video(5, (0.0, 1.0, 2.0, 3.0, 4.0)), {}).geometry
    assert clip == Clip((1.0, 4.0), 5.0, 64), "both ends of a long video are left out"


# ---- words ---------------------------------------------------------------------------------------

NUMBERS = {
    0: "zero",
    7: "seven",
    13: "thirteen",
    20: "twenty",
    21: "twenty-one",
    64: "sixty-four",
    99: "ninety-nine",
    100: "one hundred",
    101: "one hundred and one",
    128: "one hundred and twenty-eight",
    999: "nine hundred and ninety-nine",
    1000: "one thousand",
    1001: "one thousand and one",
    1100: "one thousand, one hundred",
    12345: "twelve thousand, three hundred and forty-five",
    999_999: "nine hundred and ninety-nine thousand, nine hundred and ninety-nine",
}
"""As num2words 0.5.14 writes them."""


def test_numbers_in_words() -> None:
    assert {number: in_words(number) for number in NUMBERS} == NUMBERS


def test_a_picture_names_rows_and_columns() -> None:
    around = "<fake_token_around_image>"
    assert image_text(Squares(0, 0, 2)) == f"{around}<global-img><image><image>{around}"
    assert image_text(Squares(2, 1, 1)) == (
        f"{around}<row_1_col_1><image>\n{around}<row_2_col_1><image>\n\n{around}<global-img><image>{around}"
    )


def test_a_video_names_its_length_and_times() -> None:
    text = video_text(Clip((0.0, 61.9), 3723.4, 1))
    frame = "<fake_token_around_image><global-img><image><fake_token_around_image>"
    assert text == (
        "You are provided the following series of two frames from a 1:02:03 [H:MM:SS] video.\n"
        f"\nFrame from 00:00:{frame}\nFrame from 01:01:{frame}\n\n"
    )


# ---- embeddings ----------------------------------------------------------------------------------


def test_embeddings_say_how_their_pictures_were_split() -> None:
    mapper = ImageMapper(context())
    whole, split = torch.ones(64, 5), torch.ones(3 * 64, 5)
    data = {"image_embeds": [whole, split], "rows": [0, 2], "cols": [0, 1]}
    given = [
        mapper.map(MediaItem(modality="image", digest="x", embeds=part), {})
        for part in mapper.split_embeds(data)
    ]
    assert [(part.num_embeds, part.geometry) for part in given] == [
        (64, Squares(0, 0, 64)),
        (192, Squares(2, 1, 64)),
    ]
    assert len(mapper.split_embeds(torch.ones(2, 64, 5))) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(128 + 64, 5), "192 embeddings"),
        ({"image_embeds": torch.ones(64, 5), "rows": [0]}, "expected image_embeds, rows and cols"),
        ({"image_embeds": torch.ones(64, 5), "rows": [0], "cols": [1]}, "both 0 or neither"),
        ({"image_embeds": torch.ones(64, 5), "rows": [0], "cols": [0, 0]}, "one of each per picture"),
        ({"image_embeds": torch.ones(64, 5), "rows": [0.5], "cols": [1]}, "a list of integers"),
        ({"image_embeds": torch.ones(64, 5), "rows": [2], "cols": [2]}, "have 320"),
    ],
)
def test_other_embeddings_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageMapper(context()).split_embeds(data)


def test_embeddings_of_videos_are_whole_frames() -> None:
    mapper = VideoMapper(context())
    [part] = mapper.split_embeds({"video_embeds": torch.ones(3 * 64, 5)})
    mapped = mapper.map(MediaItem(modality="video", digest="x", embeds=part), {})
    assert mapped.num_embeds == 192
    assert len(mapped.geometry.seconds) == 3
    with pytest.raises(ValueError, match="multiple of 64"):
        mapper.split_embeds(torch.ones(65, 5))


# ---- what cannot be used -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: ImageMapper(context({"size": {"shortest_edge": 5}})), "size is"),
        (lambda: ImageMapper(context({"size": {"longest_edge": -5}})), "size is"),
        (lambda: ImageMapper(context({"max_image_size": {"height": 5, "width": 5}})), "max_image_size is"),
        (lambda: ImageMapper(context({"max_image_size": {"longest_edge": 500}})), "31 patches along a side"),
        (lambda: ImageMapper(context({"do_image_splitting": "yes"})), "do_image_splitting"),
        (lambda: ImageMapper(context(processor={"image_seq_len": 169})), "image_seq_len is 169"),
        (lambda: ImageMapper(context(config={"scale_factor": 3})), "scale_factor is 3"),
        (lambda: ImageMapper(context()).map(item(5, 5), {"do_image_splitting": 1}), "true or false"),
        (lambda: ImageMapper(context()).map(item(5, 5), {"size": 5}), "size is 5"),
        (lambda: VideoMapper(context()).map(video(2), {"fps": 0}), "fps=0"),
        (lambda: VideoMapper(context()).map(video(2), {"num_frames": True}), "num_frames=True"),
        (lambda: VideoMapper(context({"video_sampling": {"fps": "fast"}})), "video_sampling.fps"),
        (lambda: language_config({"text_config": {"model_type": "mamba"}}), "expected llama"),
    ],
)
def test_settings_that_cannot_be_used(made: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()


@pytest.mark.parametrize("kind", [Idefics3Config, SmolVLMConfig])
def test_what_config_json_leaves_out_is_the_classes_default(kind: Any) -> None:
    theirs = kind()
    for name in VISION:
        assert VISION[name] == getattr(theirs.vision_config, name), name
    square = {"vision_config": {"image_size": 256}}  # 224 gives 7 x 7 patches: not even
    assert Vision.from_config(square).scale_factor == theirs.scale_factor == 2
    empty = language_config({})
    assert empty["rms_norm_eps"] == theirs.text_config.rms_norm_eps == 1e-5
    given = language_config({"text_config": {}})
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "max_position_embeddings",
    ):
        assert given[name] == empty[name] == getattr(LlamaConfig(), name), name
    assert given["rms_norm_eps"] == kind(text_config={}).text_config.rms_norm_eps
    assert given["tie_word_embeddings"] == theirs.tie_word_embeddings
