"""Sizes, pixels, placeholders and positions against recorded ones and against first principles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from opsin.api import InputContext, MappedMedia, MediaItem, PlacedMedia
from opsin.layers import fit_to_patches
from opsin_models_qwen2vl.inputs import ImageMapper, VideoMapper, placeholder
from opsin_models_qwen2vl.positions import mrope_positions

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
CONFIG = {"vision_config": {"spatial_merge_size": 2}, "image_token_id": 7}


class NoTokenizer:
    """These tests tokenize nothing."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise AssertionError

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        raise AssertionError

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return 9


def context(**preprocessor: Any) -> InputContext:
    return InputContext(config=CONFIG, preprocessor=preprocessor, tokenizer=NoTokenizer())


def image(pixels: np.ndarray[Any, Any]) -> MediaItem:
    return MediaItem(modality="image", digest="0", pixels=pixels)


def test_sizes_of_the_real_settings() -> None:
    table = json.loads((GOLDEN / "qwen2vl" / "size_table_real.json").read_text())
    assert len(table["rows"]) >= 80
    for row in table["rows"]:
        if row.get("error"):
            with pytest.raises(ValueError, match="elongated"):
                fit_to_patches(row["height"], row["width"], 28, row["min_pixels"], row["max_pixels"])
            continue
        height, width = fit_to_patches(row["height"], row["width"], 28, row["min_pixels"], row["max_pixels"])
        assert (width, height) == (row["resized_width"], row["resized_height"])
        assert [1, height // 14, width // 14] == row["grid_thw"]
        assert height * width // 28**2 == row["num_tokens"]


def test_pixels_of_the_real_settings() -> None:
    folder = GOLDEN / "qwen2vl" / "cases" / "real_preprocess"
    case = json.loads((folder / "case.json").read_text())
    recorded = load_file(folder / "tensors.safetensors")
    mapper = ImageMapper(context(min_pixels=3136, max_pixels=12845056))
    pictures = [Image.open(GOLDEN / "images" / name).convert("RGB") for name in case["images"]]
    mapped = [mapper.map(image(np.asarray(picture)), {}) for picture in pictures]
    values = torch.cat([item.tensors["pixel_values"] for item in mapped])
    assert list(values.shape) == case["tensors"]["pixel_values"]["shape"]
    sampled = values.flatten()[:: case["tensors"]["pixel_values"]["stride"]]
    assert float((sampled - recorded["pixel_values.sample"]).abs().max()) < 1e-6
    assert [list(item.geometry) for item in mapped] == recorded["image_grid_thw"].tolist()


@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    least=st.sampled_from([28 * 28, 3136, 20_000]),
    most=st.sampled_from([200_704, 1_003_520, 12_845_056]),
)
def test_resized_sides_are_multiples_within_the_bounds(
    height: int, width: int, least: int, most: int
) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="elongated"):
            fit_to_patches(height, width, 28, least, most)
        return
    new_height, new_width = fit_to_patches(height, width, 28, least, most)
    assert new_height % 28 == 0
    assert new_width % 28 == 0
    assert new_height * new_width >= least
    assert new_height * new_width <= most or 28 in (new_height, new_width)


def test_options_of_a_request_change_the_size_and_wrong_ones_are_refused() -> None:
    mapper = ImageMapper(context())
    pixels = np.zeros((300, 300, 3), np.uint8)
    small = mapper.map(image(pixels), {"max_pixels": 28 * 28 * 5})
    assert small.num_embeds == 4 < mapper.map(image(pixels), {}).num_embeds
    for options in ({"max_pixels": 0}, {"min_pixels": 5000, "max_pixels": 4000}, {"max_pixels": "big"}):
        with pytest.raises(ValueError, match="max_pixels"):
            mapper.map(image(pixels), options)


def test_video_frames_come_in_pairs() -> None:
    mapper = VideoMapper(context(min_pixels=56 * 56))
    frames = np.random.default_rng(0).integers(0, 255, (5, 56, 84, 3), dtype=np.uint8)
    item = mapper.map(MediaItem(modality="video", digest="0", pixels=frames), {})
    assert item.geometry == (3, 4, 6)
    assert item.num_embeds == 3 * 2 * 3
    rows = item.tensors["pixel_values"].view(3, 24, 3, 2, 14, 14)
    assert torch.equal(rows[2, :, :, 0], rows[2, :, :, 1]), "the odd last frame is doubled"
    assert not torch.equal(rows[0, :, :, 0], rows[0, :, :, 1])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.zeros(4, 8), "image_grid_thw"),
        ({"image_embeds": torch.zeros(4, 8)}, "image_grid_thw"),
        (
            {"image_embeds": torch.zeros(5, 8), "image_grid_thw": torch.tensor([[1, 4, 4]])},
            "has 5 embeddings.* 4$",
        ),
        ({"image_embeds": torch.zeros(4, 8), "image_grid_thw": torch.tensor([[1, 3, 4]])}, "multiples of 2"),
        ({"image_embeds": torch.zeros(4, 8), "image_grid_thw": torch.ones(1, 3)}, "integers"),
        ({"image_embeds": torch.zeros(1, 2, 4, 8), "image_grid_thw": [[1, 4, 4]]}, r"\(items, n, hidden\)"),
        ({"image_embeds": torch.zeros(4), "image_grid_thw": [[1, 4, 4]]}, "hidden"),
        ({"image_embeds": ["a"], "image_grid_thw": [[1, 4, 4]]}, "got a list; expected a tensor"),
        ({"image_embeds": torch.zeros(4, 8), "image_grid_thw": ["a"]}, "integers"),
        ({"image_embeds": torch.zeros(4, 8), "image_grid_thw": [[1, 4, 4], [2]]}, "integers"),
        (
            {"image_embeds": [torch.zeros(3, 8), torch.zeros(5, 8)], "image_grid_thw": [[1, 4, 4]] * 2},
            r"has 3 \+ 5 embeddings.* 4 \+ 4$",
        ),
        (
            {"image_embeds": [torch.zeros(4, 8), torch.zeros(4, 9)], "image_grid_thw": [[1, 4, 4]] * 2},
            "different widths",
        ),
    ],
)
def test_malformed_embeddings_are_refused(data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ImageMapper(context()).split_embeds(data)


@pytest.mark.parametrize("kind", [ImageMapper, VideoMapper])
def test_embeddings_come_in_several_layouts(kind: type[ImageMapper | VideoMapper]) -> None:
    mapper = kind(context())
    whole = torch.arange(64.0).view(2, 4, 8)
    for layout in (whole, whole.flatten(0, 1), list(whole), list(whole.unsqueeze(1)), whole.numpy()):
        for grids in (torch.tensor([[1, 4, 4]] * 2), [(1, 4, 4), (1, 4, 4)], np.array([[1, 4, 4]] * 2)):
            data = {f"{mapper.modality}_embeds": layout, f"{mapper.modality}_grid_thw": grids}
            assert torch.equal(torch.stack([item["embeds"] for item in mapper.split_embeds(data)]), whole)


def test_embeddings_are_split_by_their_grids() -> None:
    embeds = torch.arange(10.0).unsqueeze(1)
    grids = torch.tensor([[1, 4, 4], [1, 4, 6]])
    mapper = ImageMapper(context())
    items = mapper.split_embeds({"image_embeds": embeds, "image_grid_thw": grids})
    mapped = [mapper.map(MediaItem(modality="image", digest="0", embeds=item), {}) for item in items]
    assert [item.num_embeds for item in mapped] == [4, 6]
    assert [item.geometry for item in mapped] == [(1, 4, 4), (1, 4, 6)]
    assert mapped[1].embeds is not None
    assert mapped[1].embeds.flatten().tolist() == list(range(4, 10))


def test_placeholder_takes_its_id_from_the_config_or_the_tokenizer() -> None:
    made = placeholder(context(), "<|image_pad|>", "image_token_id")
    assert made.token_id == 7
    assert made.expand(MappedMedia(num_embeds=3), 1).token_ids == [7, 7, 7]
    assert placeholder(context(), "<|video_pad|>", "video_token_id").token_id == 9


def test_positions_of_the_papers_layout() -> None:
    media = [
        PlacedMedia(
            modality="image",
            key="0",
            mapped=MappedMedia(num_embeds=6, geometry=(1, 4, 6)),
            start=2,
            is_embed=[True] * 6,
        )
    ]
    positions = mrope_positions(CONFIG, [0] * 10, media)
    assert positions.prompt.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert positions.delta == -3, "token 10 stands at 7"


@pytest.mark.parametrize("shape", [(5, 2, 2), (7, 1, 3), (2, 4, 1), (3, 3, 3)])
def test_what_follows_a_video_comes_after_its_longest_side_be_it_time(shape: tuple[int, int, int]) -> None:
    """The paper's rule: one after the largest position so far. transformers 5 forgets the time axis here."""
    steps, rows, columns = shape
    count = steps * rows * columns
    video = PlacedMedia(
        modality="video",
        key="0",
        mapped=MappedMedia(num_embeds=count, geometry=(steps, 2 * rows, 2 * columns)),
        start=1,
        is_embed=[True] * count,
    )
    positions = mrope_positions(CONFIG, [0] * (count + 3), [video])
    places = [(t, h, w) for t in range(steps) for h in range(rows) for w in range(columns)]
    assert positions.prompt[:, 1:-2].T.tolist() == [[1 + t, 1 + h, 1 + w] for t, h, w in places]
    after = 1 + max(shape)
    assert positions.prompt[:, -2:].tolist() == [[after, after + 1]] * 3
    assert positions.delta == after + 2 - (count + 3)
