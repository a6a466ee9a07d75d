"""Sizes, pixels, placeholders and embeddings against recorded ones and against first principles."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.api import InputContext, MappedMedia, MediaItem
from opsin.testing.models import find_placeholders, recorded_cases
from opsin_models_phi3v.inputs import (
    CROP,
    MAX_CROPS,
    ImageMapper,
    hd_size,
    hd_transform,
    image_placeholder,
    is_possible,
    num_embeds,
)

GOLDEN = Path(__file__).parents[3] / "tests" / "golden" / "phi3v"
PICTURES = GOLDEN.parent / "images"
IMAGE_ID = 32044


class RecordedTokenizer:
    """Answers with what was recorded of the real vocabulary, and knows nothing else."""

    bos_token = "<s>"

    def __init__(self, known: Mapping[str, Sequence[int]]) -> None:
        self._known = known

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = list(self._known[text])
        assert ids[0] == 1
        return ids if add_special_tokens else ids[1:]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        raise AssertionError

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return {"<|image|>": IMAGE_ID}[tokens]


def context(known: Mapping[str, Sequence[int]] | None = None, **preprocessor: Any) -> InputContext:
    return InputContext(config={}, preprocessor=preprocessor, tokenizer=RecordedTokenizer(known or {}))


def image(pixels: np.ndarray[Any, Any]) -> MediaItem:
    return MediaItem(modality="image", digest="0", pixels=pixels)


# --- sizes ----------------------------------------------------------------------------------------


def test_sizes_of_the_real_settings() -> None:
    rows = json.loads((GOLDEN / "size_table_real.json").read_text())["rows"]
    assert len(rows) == 120
    assert {row["num_crops"] for row in rows} == {1, 4, 16}
    for row in rows:
        tall = row["width"] < row["height"]
        sides = sorted((row["width"], row["height"]))
        height, width = hd_size(sides[0], sides[1], row["num_crops"])
        padded = (math.ceil(height / CROP) * CROP, width)
        assert padded[:: -1 if tall else 1] == (row["padded_height"], row["padded_width"])
        assert num_embeds((padded[0] // CROP, padded[1] // CROP)[:: -1 if tall else 1]) == row["num_tokens"]


@given(height=st.integers(1, 3000), extra=st.integers(0, 3000), num_crops=st.integers(1, MAX_CROPS))
def test_crops_are_as_many_as_allowed_and_keep_the_shape(height: int, extra: int, num_crops: int) -> None:
    width = height + extra
    if width / height > num_crops * CROP:
        with pytest.raises(ValueError, match="too elongated"):
            hd_size(height, width, num_crops)
        return
    new_height, new_width = hd_size(height, width, num_crops)
    assert new_width % CROP == 0
    columns, rows = new_width // CROP, math.ceil(new_height / CROP)
    assert 1 <= columns * rows <= num_crops
    ratio = width / height  # rounded as the hub rounds it
    assert (columns + 1) * math.ceil((columns + 1) / ratio) > num_crops, "one more column would fit"
    assert abs(new_height - new_width * height / width) <= 1


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 200), extra=st.integers(1, 100), num_crops=st.integers(1, 9))
def test_a_tall_picture_is_treated_as_a_wide_one(height: int, extra: int, num_crops: int) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, height + extra, 3), dtype=np.uint8)
    wide = hd_transform(pixels, num_crops)
    tall = hd_transform(np.ascontiguousarray(pixels.swapaxes(0, 1)), num_crops)
    assert np.array_equal(wide, tall.swapaxes(0, 1))
    assert wide.shape[0] % CROP == wide.shape[1] % CROP == 0


def test_padding_is_white_and_the_odd_line_below() -> None:
    padded = hd_transform(np.zeros((101, 336, 3), np.uint8), 1)
    assert padded.shape == (CROP, CROP, 3)
    dark = np.flatnonzero((padded == 0).all(axis=(1, 2)))
    assert (dark[0], dark[-1]) == (117, 217), "101 lines in the middle of 336, 117 above and 118 below"
    assert ((padded == 255) | (padded == 0)).all()


# --- pixels ---------------------------------------------------------------------------------------

RECORDED = [
    *recorded_cases(GOLDEN, PICTURES, runs_model=False),
    *(c for c in recorded_cases(GOLDEN, PICTURES) if c.data["images"]),
]


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_pixels_are_the_recorded_ones(case: Any) -> None:
    real = case.data["model_dir"] is None
    mapper = ImageMapper(context(num_crops=16 if real else 4))
    mapped = [
        mapper.map(image(np.asarray(case.picture(name))), case.data.get("mm_processor_kwargs") or {})
        for name in case.data["images"]
    ]
    assert [[side * CROP for side in item.geometry] for item in mapped] == case.data["image_sizes"]
    tokens = case.data["num_img_tokens" if real else "num_image_tokens"]
    assert [item.num_embeds for item in mapped] == tokens
    stacked = torch.zeros(case.data["tensors"]["pixel_values"]["shape"])
    for row, item in zip(stacked, mapped, strict=True):
        values = item.tensors["pixel_values"]
        row[: len(values)] = values  # the hub pads with zeros to the most crops
    # Measured: 0.0; the global view (bicubic) is computed by torch, whose versions may differ.
    assert case.differs("pixel_values", stacked) < 1e-6


def test_crops_are_the_picture_in_reading_order() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (672, 1008, 3), dtype=np.uint8)
    mapped = ImageMapper(context(image_mean=[0, 0, 0], image_std=[1, 1, 1])).map(
        image(pixels), {"num_crops": 6}
    )
    assert mapped.geometry == (2, 3)
    crops = mapped.tensors["pixel_values"][1:]
    for number, crop in enumerate(crops):
        top, left = number // 3 * CROP, number % 3 * CROP
        expected = pixels[top : top + CROP, left : left + CROP].transpose(2, 0, 1)
        assert np.allclose(crop.numpy() * 255, expected, atol=1e-3)


# --- options and errors ---------------------------------------------------------------------------


def test_the_number_of_crops_is_an_option() -> None:
    mapper = ImageMapper(context(num_crops=4))
    pixels = np.zeros((300, 300, 3), np.uint8)
    grids = {n: mapper.map(image(pixels), {"num_crops": n}).geometry for n in (1, 4, 16, MAX_CROPS)}
    assert grids == {1: (1, 1), 4: (2, 2), 16: (4, 4), MAX_CROPS: (8, 8)}
    assert mapper.map(image(pixels), {}).geometry == (2, 2)
    assert ImageMapper(context()).map(image(pixels), {}).geometry == (1, 1)


@pytest.mark.parametrize("count", [0, -1, 2.0, "4", True, None, MAX_CROPS + 1])
def test_other_numbers_of_crops_are_refused(count: Any) -> None:
    with pytest.raises(ValueError, match=f"num_crops={count!r}: expected an integer from 1 to {MAX_CROPS}"):
        ImageMapper(context()).map(image(np.zeros((3, 3, 3), np.uint8)), {"num_crops": count})


@pytest.mark.parametrize("shape", [(1, 2000, 3), (2000, 1, 3)])
def test_a_thread_is_no_picture(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="longer side may be at most 1344 times the shorter one"):
        ImageMapper(context(num_crops=4)).map(image(np.zeros(shape, np.uint8)), {})


# --- embeddings as input --------------------------------------------------------------------------


def test_embeddings_are_one_item_per_picture() -> None:
    mapper = ImageMapper(context())
    for data in (torch.zeros(2, 313, 8), [torch.zeros(313, 8), torch.zeros(757, 8)]):
        items = mapper.split_embeds(data)
        mapped = [mapper.map(MediaItem(modality="image", digest="0", embeds=item), {}) for item in items]
        assert [item.num_embeds for item in mapped] == [len(part) for part in data]
        assert all(item.embeds is not None and not item.tensors for item in mapped)


@pytest.mark.parametrize("rows", [6, 576, 312, 314, 144, 2 * 313])
def test_numbers_of_embeddings_that_no_picture_has_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=rf"\({rows}, 8\).*for 1 x 1 crops 313"):
        ImageMapper(context()).split_embeds(torch.zeros(rows, 8))


def test_possible_numbers_are_those_of_the_grids() -> None:
    counts = {num_embeds((rows, columns)) for rows in range(1, 40) for columns in range(1, 40)}
    assert [count for count in range(1, 3000) if is_possible(count)] == sorted(n for n in counts if n < 3000)


# --- placeholders ---------------------------------------------------------------------------------

REAL = json.loads((GOLDEN / "real_tokenizer_cases.json").read_text())["cases"]
TAG = re.compile(r"<\|image_(\d+)\|>")
TAG_IDS = {
    # Read off the recorded whole prompts, where a line break or the beginning stands before them.
    "<|image_1|>": [1, 529, 29989, 3027, 29918, 29896, 29989, 29958],
    "<|image_2|>": [1, 529, 29989, 3027, 29918, 29906, 29989, 29958],
    "\n": [1, 29871, 13],
    "\n<|image_1|>": [1, 29871, 13, 29966, 29989, 3027, 29918, 29896, 29989, 29958],
    "\n<|image_2|>": [1, 29871, 13, 29966, 29989, 3027, 29918, 29906, 29989, 29958],
}


def found(text: str, known: Mapping[str, Sequence[int]], count: int, **options: Any) -> list[Any]:
    """The ids of a prompt, with (modality, number) in place of the items."""
    placeholders = {"image": image_placeholder(context(known))}
    return find_placeholders(text, placeholders, RecordedTokenizer(known), {"image": count}, options)


@pytest.mark.parametrize("case", REAL, ids=lambda case: case["prompt"][:24])
def test_real_prompts_are_tokenized_as_the_hub_does(case: dict[str, Any]) -> None:
    texts = TAG.split(case["prompt"])[::2]
    known = dict(zip(texts, case["chunk_ids"], strict=True))
    count = len(texts) - 1
    expected: list[Any] = list(case["chunk_ids"][0])
    for number, ids in enumerate(case["chunk_ids"][1:], 1):
        expected += [("image", number), *ids]
    assert found(case["prompt"], known, count) == expected


@pytest.mark.parametrize("case", REAL, ids=lambda case: case["prompt"][:24])
def test_real_prompts_can_be_tokenized_as_a_whole(case: dict[str, Any]) -> None:
    known = {**TAG_IDS, case["prompt"]: case["whole_prompt_ids"]}
    count = len(TAG.findall(case["prompt"]))
    given = found(case["prompt"], known, count, tokenize_whole_prompt=True)
    written: list[int] = []
    for part in given:
        if isinstance(part, int):
            written.append(part)
        else:
            before = "\n" if written[-1] == 13 else ""
            written += TAG_IDS[f"{before}<|image_{part[1]}|>"][3 if before else 1 :]
    assert written == case["whole_prompt_ids"]
    assert [part[1] for part in given if isinstance(part, tuple)] == list(range(1, count + 1))


def test_a_placeholder_becomes_image_tokens() -> None:
    made = image_placeholder(context())
    assert made.text(12) == "<|image_12|>"
    expansion = made.expand(MappedMedia(num_embeds=3), 1)
    assert expansion.token_ids == [IMAGE_ID] * 3
    assert expansion.is_embed == [True] * 3


def test_the_whole_prompt_option_is_true_or_false() -> None:
    rule = image_placeholder(context()).tokenizes_whole
    assert rule is not None
    assert (rule({}), rule({"tokenize_whole_prompt": False})) == (False, False)
    assert rule({"tokenize_whole_prompt": True, "num_crops": 3})
    with pytest.raises(ValueError, match="expected true or false"):
        rule({"tokenize_whole_prompt": "yes"})
