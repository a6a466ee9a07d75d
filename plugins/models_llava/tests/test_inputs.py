"""Sizes, pixels, placeholders and embeddings against recorded ones, transformers and first principles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import center_crop
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from opsin.api import InputContext, MappedMedia, MediaItem
from opsin_models_llava.grid import Grid, best_resolution, fitted_size, grids_of
from opsin_models_llava.inputs import (
    DEFAULT_PINPOINTS,
    MAX_ELONGATION,
    GridMapper,
    SquareMapper,
    SquareProcessing,
    centre,
    placeholder,
)

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
CLIP_336 = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
SIGLIP_384 = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}
HUB_SETTINGS = {
    "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336},
    "size": {"shortest_edge": 336},
    "image_processor_type": "CLIPImageProcessor",
}


class NoTokenizer:
    """These tests tokenize nothing."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        raise AssertionError

    def convert_tokens_to_ids(self, tokens: str) -> int:
        assert tokens == "<image>"
        return 9


def context(config: dict[str, Any] | None = None, **preprocessor: Any) -> InputContext:
    config = {"vision_config": CLIP_336} if config is None else config
    return InputContext(config=config, preprocessor=preprocessor or HUB_SETTINGS, tokenizer=NoTokenizer())


def image(pixels: Any) -> MediaItem:
    return MediaItem(modality="image", digest="0", pixels=np.asarray(pixels))


def picture(name: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(GOLDEN / "images" / name).convert("RGB"))


def random_picture(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(height * 7919 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def recorded(family: str) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """(case.json, tensors) of every recorded case with pictures."""
    files = sorted((GOLDEN / family / "cases").glob("*/case.json"))
    cases = [(json.loads(file.read_text()), file.with_name("tensors.safetensors")) for file in files]
    return [(case, load_file(tensors)) for case, tensors in cases if case["images"]]


def check_pixels(case: dict[str, Any], tensors: dict[str, torch.Tensor], values: list[torch.Tensor]) -> None:
    """Hold pixel values against recorded ones, which are padded to one number of squares."""
    about = case["tensors"]["pixel_values"]
    stacked = torch.zeros(about["shape"])
    for row, value in zip(stacked, values, strict=True):
        row.view(-1, *value.shape[1:])[: len(value)] = value
    if about["stored"] == "full":
        given, expected = stacked, tensors["pixel_values"]
    else:
        given, expected = stacked.flatten()[:: about["stride"]], tensors[about["key"]]
    assert float((given - expected).abs().max()) < 1e-6


def settings_of(case: dict[str, Any], family: str) -> InputContext:
    """The tiny checkpoint's settings, or the hub's where the case says so."""
    if case["model_dir"] is None:
        return context()
    folder = GOLDEN / family / "model"
    config, settings = (
        json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")
    )
    return InputContext(config=config, preprocessor=settings, tokenizer=NoTokenizer())


# --------------------------------------------------------------------------------------------------
# Squares
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "tensors"), recorded("llava15"), ids=lambda value: str(value.get("case")))
def test_squares_are_the_recorded_ones(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    mapper = SquareMapper(settings_of(case, "llava15"))
    mapped = [mapper.map(image(picture(name)), {}) for name in case["images"]]
    check_pixels(case, tensors, [item.tensors["pixel_values"] for item in mapped])
    expected = [576] * 5 if case["model_dir"] is None else case["num_image_tokens"]
    assert [item.num_embeds for item in mapped] == expected


@pytest.mark.parametrize("size", [(5, 5), (9, 4), (4, 9), (3, 3), (2, 8), (8, 3), (1, 1), (7, 6)])
@pytest.mark.parametrize("want", [(4, 4), (5, 5), (6, 3)])
def test_centre_is_transformers_center_crop(size: tuple[int, int], want: tuple[int, int]) -> None:
    pixels = random_picture(*size)
    expected = center_crop(pixels.transpose(2, 0, 1), want, input_data_format="channels_first")
    assert np.array_equal(centre(pixels, want), expected.transpose(1, 2, 0))


@pytest.mark.parametrize("size", [(40, 61), (61, 40), (50, 50), (17, 90)])
def test_padding_to_a_square_is_transformers(size: tuple[int, int]) -> None:
    settings = {**HUB_SETTINGS, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    settings |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255}
    theirs = LlavaImageProcessorPil(**settings)
    pixels = random_picture(*size)
    expected = theirs(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    mapped = SquareMapper(context(**settings)).map(image(pixels), {})
    assert float((mapped.tensors["pixel_values"] - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("size", [(40, 61), (500, 400), (384, 384)])
def test_siglips_squares_are_transformers(size: tuple[int, int]) -> None:
    settings = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}}
    pixels = random_picture(*size)
    expected = SiglipImageProcessorPil(**settings)(images=Image.fromarray(pixels), return_tensors="pt")
    config = {"vision_config": SIGLIP_384, "vision_feature_select_strategy": "full"}
    mapped = SquareMapper(context(config, **settings)).map(image(pixels), {})
    assert float((mapped.tensors["pixel_values"] - expected["pixel_values"]).abs().max()) < 1e-6
    assert mapped.num_embeds == 729


@pytest.mark.parametrize(
    ("vision", "strategy", "count"),
    [
        (CLIP_336, "default", 576),
        (CLIP_336, "full", 577),
        (SIGLIP_384, "full", 729),
        (SIGLIP_384, "default", 728),
    ],
)
def test_number_of_embeddings(vision: dict[str, Any], strategy: str, count: int) -> None:
    config = {"vision_config": vision, "vision_feature_select_strategy": strategy}
    side = vision["image_size"]
    mapper = SquareMapper(context(config, crop_size={"height": side, "width": side}))
    assert mapper.map(image(random_picture(60, 50)), {}).num_embeds == count


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 2), (2, 200)])
def test_any_shape_becomes_a_square(size: tuple[int, int]) -> None:
    square = SquareProcessing(HUB_SETTINGS, 336).square(random_picture(*size))
    assert square.shape == (336, 336, 3)


def test_a_very_long_picture_is_cut_to_what_is_seen_of_it() -> None:
    """The result is that of resizing all of it, but for the rounding of the length."""
    pixels = np.zeros((40, 40 * 90, 3), np.uint8)
    pixels[:] = (np.arange(40 * 90) % 240)[None, :, None]
    assert pixels.shape[1] > MAX_ELONGATION * 40
    whole = np.asarray(Image.fromarray(pixels).resize((336 * 90, 336), Image.Resampling.BICUBIC))
    square = SquareProcessing(HUB_SETTINGS, 336).square(pixels)
    assert np.array_equal(square, centre(whole, (336, 336)))


@pytest.mark.parametrize(
    "settings",
    [
        {**HUB_SETTINGS, "crop_size": {"height": 224, "width": 224}},
        {**HUB_SETTINGS, "do_center_crop": False},
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}},
    ],
)
@pytest.mark.parametrize("mapper", [SquareMapper, GridMapper])
def test_settings_of_another_tower_are_refused(mapper: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="336x336"):
        mapper(context(**settings))


@pytest.mark.parametrize(
    "settings",
    [{"size": 336, "crop_size": 336}, {"rescale_factor": 1 / 255}, {"size": {"shortest_edge": 336}}],
)
def test_older_and_shorter_settings_mean_the_same(settings: dict[str, Any]) -> None:
    pixels = image(picture("coffee_320x213.png"))
    usual = SquareMapper(context()).map(pixels, {}).tensors["pixel_values"]
    assert torch.equal(SquareMapper(context(**settings)).map(pixels, {}).tensors["pixel_values"], usual)


# --------------------------------------------------------------------------------------------------
# Grids
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "tensors"), recorded("llava_next"), ids=lambda value: str(value.get("case"))
)
def test_grids_are_the_recorded_ones(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    mapper = GridMapper(settings_of(case, "llava_next"))
    mapped = [mapper.map(image(picture(name)), {}) for name in case["images"]]
    check_pixels(case, tensors, [item.tensors["pixel_values"] for item in mapped])
    if case["model_dir"] is not None:
        assert [item.num_embeds for item in mapped] == case["num_image_tokens"]
        assert [len(item.tensors["pixel_values"]) for item in mapped] == case["num_patches"]


def test_sizes_of_the_real_settings() -> None:
    table = json.loads((GOLDEN / "llava_next" / "size_table_real.json").read_text())
    assert len(table["rows"]) >= 40
    for row in table["rows"]:
        size = row["height"], row["width"]
        grid = Grid.of(size, best_resolution(size, DEFAULT_PINPOINTS), crop=336, side=24)
        assert (grid.rows, grid.columns) == (row["grid_h"], row["grid_w"])
        assert 576 + grid.num_rows == row["num_tokens"] == row["num_tokens_by_model"]
        assert 1 + grid.rows * grid.columns == row["num_patches"]


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    pinpoints=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6, unique=True),
)
def test_geometry_is_transformers(height: int, width: int, pinpoints: list[tuple[int, int]]) -> None:
    crop, side = 28, 2
    canvases = [(rows * crop, columns * crop) for rows, columns in pinpoints]
    size = height, width
    canvas = best_resolution(size, canvases)
    assert canvas == select_best_resolution(size, canvases)
    like = np.broadcast_to(np.uint8(0), (3, height, width))
    assert fitted_size(size, canvas) == get_patch_output_size(
        like, canvas, input_data_format="channels_first"
    )
    grid = Grid.of(size, canvas, crop=crop, side=side)
    assert (grid.rows, grid.columns) == get_anyres_image_grid_shape(size, canvases, crop)
    assert grid in set(grids_of(canvas, crop=crop, side=side))
    features = torch.arange(grid.rows * grid.columns * side**2).view(1, grid.rows * side, grid.columns * side)
    seen = features[0, grid.top : grid.top + grid.height, grid.left : grid.left + grid.width]
    assert torch.equal(seen, unpad_image(features, size)[0])


@pytest.mark.parametrize("size", [(88, 99), (99, 88), (55, 176), (176, 55), (47, 1128), (1128, 47)])
def test_sizes_at_which_rounding_decides(size: tuple[int, int]) -> None:
    """Whole rows come or go with the last bit of a ratio: with the hub's crops, patches and candidates."""
    canvas = select_best_resolution(size, DEFAULT_PINPOINTS)
    grid = Grid.of(size, best_resolution(size, DEFAULT_PINPOINTS), crop=336, side=24)
    assert (grid.rows, grid.columns) == (canvas[0] // 336, canvas[1] // 336)
    features = torch.arange(grid.rows * grid.columns * 24**2).view(1, grid.rows * 24, grid.columns * 24)
    seen = features[0, grid.top : grid.top + grid.height, grid.left : grid.left + grid.width]
    assert torch.equal(seen, unpad_image(features, size)[0])


@given(height=st.integers(1, 500), width=st.integers(1, 500))
def test_turning_a_picture_turns_its_grid(height: int, width: int) -> None:
    """With candidates that come in pairs; a tie between two of them goes to the first, hence the assume."""
    canvases = [(28, 56), (56, 28), (56, 56), (28, 84), (84, 28)]
    straight, turned = (best_resolution(size, canvases) for size in ((height, width), (width, height)))
    assume(height != width)
    one = Grid.of((height, width), straight, crop=28, side=2)
    other = Grid.of((width, height), straight[::-1], crop=28, side=2)
    assert (one.height, one.width) == (other.width, other.height)
    assert sorted(straight) == sorted(turned)


def test_padding_is_black_and_in_the_right_place() -> None:
    pixels = np.full((80, 400, 3), 255, np.uint8)
    mapped = GridMapper(context()).map(image(pixels), {})
    grid = mapped.geometry
    assert (grid.rows, grid.columns) == (1, 2)
    values = mapped.tensors["pixel_values"]
    assert values.shape == (3, 3, 336, 336)
    assert float(values[0].min()) > 0, "the whole picture is not padded"
    white = values[1:, 0].permute(1, 0, 2).flatten(1) > 0  # (336, 2 * 336)
    rows = white.all(1).nonzero().flatten()
    assert bool((white.any(1) == white.all(1)).all())
    assert (int(rows[0]), int(rows[-1])) == (100, 234), "ceil(80 * 672 / 400) = 135 rows in the middle"
    assert grid.top == (24 - int(80 * 48 / 400)) // 2


def test_a_line_of_a_picture_leaves_only_the_whole() -> None:
    mapped = GridMapper(context()).map(image(random_picture(1, 4000)), {})
    assert mapped.geometry.num_rows == 0
    assert mapped.num_embeds == 576


def test_pinpoints_come_from_the_processor_then_the_model() -> None:
    pixels = image(random_picture(100, 100))
    square = [[336, 336]]
    ours = GridMapper(context({"vision_config": CLIP_336, "image_grid_pinpoints": square}))
    assert ours.map(pixels, {}).geometry == Grid(1, 1, 0, 0, 24)
    settings = {**HUB_SETTINGS, "image_grid_pinpoints": [[672, 672]]}
    ours = GridMapper(context({"vision_config": CLIP_336}, **settings))
    assert ours.map(pixels, {}).geometry == Grid(2, 2, 0, 0, 24)
    with pytest.raises(
        ValueError, match=r"672, 672.* in preprocessor_config.json, .*336, 336.* in config.json"
    ):
        GridMapper(context({"vision_config": CLIP_336, "image_grid_pinpoints": square}, **settings))


@pytest.mark.parametrize("pinpoints", [[[336, 500]], [[336, 0]]])
def test_pinpoints_that_are_no_grid_are_refused(pinpoints: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="multiples of 336"):
        GridMapper(context(**HUB_SETTINGS, image_grid_pinpoints=pinpoints))


# --------------------------------------------------------------------------------------------------
# Embeddings and placeholders
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"embeds": torch.zeros(576, 8)}, "dict"),
        ("embeddings", "str"),
        ([torch.zeros(576, 8), "embeddings"], "list"),
        (torch.zeros(8), "expected"),
        (torch.zeros(1, 2, 576, 8), "expected"),
        (torch.zeros(1, 0, 8), "expected"),
        (torch.zeros(1, 576, 8).to_sparse(), "dense"),
    ],
)
@pytest.mark.parametrize("mapper", [SquareMapper, GridMapper])
def test_malformed_embeddings_are_refused(mapper: Any, data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mapper(context()).split_embeds(data)


def test_every_picture_of_llava15_has_as_many_embeddings() -> None:
    with pytest.raises(ValueError, match=r"\(577, 8\), expected \(576, hidden\)"):
        SquareMapper(context()).split_embeds(torch.zeros(2, 577, 8))


@pytest.mark.parametrize("mapper", [SquareMapper, GridMapper])
@pytest.mark.parametrize("as_list", [False, True])
def test_embeddings_are_one_item_per_picture(mapper: Any, as_list: bool) -> None:
    data = torch.randn(3, 576, 8, generator=torch.Generator().manual_seed(0))
    ours = mapper(context())
    items = ours.split_embeds(list(data) if as_list else data)
    mapped = [ours.map(MediaItem(modality="image", digest="0", embeds=item), {}) for item in items]
    assert [item.num_embeds for item in mapped] == [576] * 3
    for item, expected in zip(mapped, data, strict=True):
        assert torch.equal(item.embeds, expected)


def test_embeddings_of_grids_differ_in_number() -> None:
    ours = GridMapper(context())
    items = ours.split_embeds([torch.zeros(1176, 8), torch.zeros(1, 1464, 8)])
    mapped = [ours.map(MediaItem(modality="image", digest="0", embeds=item), {}) for item in items]
    assert [item.num_embeds for item in mapped] == [1176, 1464]
    with pytest.raises(ValueError, match="no size of picture gives 1177"):
        ours.split_embeds([torch.zeros(1176, 8), torch.zeros(1177, 8)])


@pytest.mark.parametrize(
    ("config", "token"), [({"image_token_index": 32000}, 32000), ({"image_token_id": 7}, 7), ({}, 9)]
)
def test_placeholder_takes_its_id_from_the_config_or_the_tokenizer(
    config: dict[str, Any], token: int
) -> None:
    made = placeholder(context({"vision_config": CLIP_336, **config}))
    assert made.token_id == token
    assert made.text(1) == made.text(2) == "<image>"
    expansion = made.expand(MappedMedia(num_embeds=3), 1)
    assert (expansion.token_ids, expansion.is_embed) == ([token] * 3, [True] * 3)
