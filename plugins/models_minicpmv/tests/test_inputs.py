"""Pixels, placeholders, options and embeddings of the three versions, against recorded ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opsin.api import InputContext, MappedMedia, MediaItem
from opsin.testing.models import RecordedCase, input_context, recorded_cases
from opsin_models_minicpmv.inputs import ImageMapper, Slices, VideoMapper, placeholder
from opsin_models_minicpmv.plugin import opsin_register_input_mappers, opsin_register_placeholders

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
FAMILIES = ["minicpmv20", "minicpmv25", "minicpmv26"]


def cases(family: str, *, runs_model: bool = True) -> Sequence[RecordedCase]:
    return recorded_cases(GOLDEN / family, GOLDEN / "images", runs_model=runs_model)


picture = cases(FAMILIES[0])[0].picture


def context(family: str, *, options: dict[str, Any] | None = None, **changes: Any) -> InputContext:
    """Of the recorded checkpoint; ``options`` of the engine, ``changes`` to its preprocessor settings."""
    return input_context(GOLDEN / family / "model", options=options, **changes)


def image(value: Image.Image) -> MediaItem:
    return MediaItem(modality="image", digest="0", pixels=np.asarray(value.convert("RGB")))


def recorded_layout(mapped: MappedMedia, family: str) -> Tensor:
    """Patches as the family's own processor lays them out, flat."""
    slices: Slices = mapped.geometry
    patches = mapped.tensors["patches"].unflatten(1, (3, 14, 14))
    parts = []
    for part, shape in zip(patches.split([h * w for h, w in slices.patches]), slices.patches):
        if family == "minicpmv20":  # whole pictures
            parts.append(part.unflatten(0, shape).permute(2, 0, 3, 1, 4).flatten())
        else:  # one line of patches
            parts.append(part.permute(1, 2, 0, 3).flatten())
    return torch.cat(parts)


def pixels_differ(case: RecordedCase, mapped: list[MappedMedia]) -> float:
    shapes = [list(shape) for item in mapped for shape in item.geometry.patches]
    assert shapes == case.tensors["tgt_sizes"].tolist()
    return case.differs("pixel_values_concat", torch.cat([recorded_layout(m, case.family) for m in mapped]))


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_of_the_real_settings(family: str) -> None:
    [case] = cases(family, runs_model=False)
    mapper = ImageMapper(context(family, scale_resolution=448))
    coffee, rocket = (picture(name).convert("RGB") for name in case.data["images"])
    enlarged = coffee.resize((960, 639), Image.Resampling.BICUBIC)
    assert pixels_differ(case, [mapper.map(image(value), {}) for value in (enlarged, rocket)]) < 1e-6


@pytest.mark.parametrize(
    "case", [case for family in FAMILIES for case in cases(family) if case.data["images"]], ids=str
)
def test_pixels_and_marks_of_the_recorded_cases(case: RecordedCase) -> None:
    given = context(case.family)
    mapper = ImageMapper(given)
    made = placeholder(given, "(<image>./</image>)")
    options = case.data.get("mm_processor_kwargs") or {}
    mapped = [mapper.map(image(value), options) for value in case.media()["image"]]
    assert pixels_differ(case, mapped) < 1e-6
    assert [item.num_embeds for item in mapped] == case.data["num_image_tokens"]
    ids = case.data["prompt_token_ids"]
    bounds = iter(case.data["image_bounds"])
    for number, (item, text) in enumerate(zip(mapped, case.data["expanded_placeholders"], strict=True), 1):
        expansion = made.expand(item, number)
        assert list(expansion.token_ids) == given.tokenizer.encode(text, add_special_tokens=False)
        assert sum(expansion.is_embed) == item.num_embeds
        embed_places = np.flatnonzero(expansion.is_embed)
        # Where the first slice begins in the prompt tells where the item begins.
        begins = None
        for places in embed_places.reshape(-1, 16):
            first, last = next(bounds)
            begins = first - places[0] if begins is None else begins
            assert (begins + places[0], begins + places[-1] + 1) == (first, last)
        assert begins is not None
        assert ids[begins : begins + len(expansion.token_ids)] == list(expansion.token_ids)


def test_the_recorded_tokenizer_gives_the_slow_ones_ids() -> None:
    tokenizer = context("minicpmv20").tokenizer
    for row in json.loads((GOLDEN / "minicpmv20" / "tokenizer_slow_vs_fast.json").read_text()):
        assert tokenizer.encode(row["text"]) == row["slow"]


@pytest.mark.parametrize("family", FAMILIES)
def test_options_change_the_slices_and_wrong_ones_are_refused(family: str) -> None:
    mapper = ImageMapper(context(family))
    large = image(picture("coffee_320x213.png"))
    assert [len(mapper.map(large, {"max_slice_nums": n}).geometry.patches) for n in (1, 2, 9)] == [1, 3, 7]
    for wrong in (0, -1, 2.5, "9", True, None):
        with pytest.raises(ValueError, match="max_slice_nums"):
            mapper.map(large, {"max_slice_nums": wrong})
    with pytest.raises(ValueError, match="use_image_id"):
        mapper.map(large, {"use_image_id": "yes"})
    assert mapper.option_names == {"max_slice_nums"} | ({"use_image_id"} if family == "minicpmv26" else set())


def test_a_checkpoint_that_does_not_slice_sees_the_whole() -> None:
    mapper = ImageMapper(context("minicpmv26", slice_mode=False))
    assert mapper.map(image(picture("coffee_320x213.png")), {}).geometry.grids == (None,)


def test_pictures_are_numbered_from_zero_if_at_all() -> None:
    given = context("minicpmv26")
    made = placeholder(given, "(<image>./</image>)")
    for use, text in ((True, "<image_id>4</image_id><image>"), (False, "<image>")):
        mapped = ImageMapper(given).map(image(picture("astronaut_96x96.png")), {"use_image_id": use})
        written = given.tokenizer.decode(list(made.expand(mapped, 5).token_ids))
        assert written.startswith(text)
        assert written.count("<unk>") == 16


def test_frames_of_a_video_are_pictures_of_few_slices() -> None:
    given = context("minicpmv26")
    frames = np.stack([np.asarray(picture("coffee_320x213.png").convert("RGB"))] * 3)
    mapped = VideoMapper(given).map(MediaItem(modality="video", digest="0", pixels=frames), {})
    assert mapped.geometry.grids == ((2, 1),) * 3
    assert mapped.num_embeds == 3 * 3 * 16
    assert not mapped.geometry.numbered
    written = given.tokenizer.decode(
        list(placeholder(given, "(<video>./</video>)").expand(mapped, 1).token_ids)
    )
    frame = "<image></image><slice></slice><slice></slice>"
    assert written.replace("<unk>", "") == "\n".join([frame] * 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_one_version_takes_videos(family: str) -> None:
    given = context(family)
    for specs in (opsin_register_input_mappers(), opsin_register_placeholders()):
        taken = {spec.modality for spec in specs if spec.build(given) is not None}
        assert taken == ({"image", "video"} if family == "minicpmv26" else {"image"})


# ---- ready-made embeddings ------------------------------------------------------------------------

SIZES = [(320, 213), (96, 96)]  # 7 slices and 1


def embeds(slices: int, queries: int = 16) -> Tensor:
    return torch.arange(slices * queries * 4.0).view(slices, queries, 4)


@pytest.mark.parametrize("sizes_name", ["image_sizes", "image_size_list"])
@pytest.mark.parametrize("as_list", [False, True])
def test_embeddings_are_split_by_the_slices_of_their_sizes(sizes_name: str, as_list: bool) -> None:
    mapper = ImageMapper(context("minicpmv26"))
    whole = embeds(8)
    items = mapper.split_embeds(
        {"image_embeds": list(whole.split([7, 1])) if as_list else whole, sizes_name: SIZES}
    )
    mapped = [mapper.map(MediaItem(modality="image", digest="0", embeds=item), {}) for item in items]
    assert [item.num_embeds for item in mapped] == [7 * 16, 16]
    assert [item.geometry.sizes for item in mapped] == [((320, 213),), ((96, 96),)]
    assert [item.geometry.grids for item in mapped] == [((3, 2),), (None,)]
    assert mapped[0].embeds is not None
    assert mapped[1].embeds is not None
    assert torch.equal(torch.cat([mapped[0].embeds, mapped[1].embeds]), whole.flatten(0, 1))


def test_embeddings_may_be_flat() -> None:
    mapper = ImageMapper(context("minicpmv26"))
    layouts = [embeds(8), embeds(8).flatten(0, 1)]
    flat, whole = (mapper.split_embeds({"image_embeds": e, "image_sizes": SIZES}) for e in layouts)
    assert [item["embeds"].shape for item in flat] == [item["embeds"].shape for item in whole]


def test_embeddings_of_a_picture_cut_otherwise() -> None:
    mapper = ImageMapper(context("minicpmv26"))
    [item] = mapper.split_embeds({"image_embeds": embeds(3), "image_sizes": SIZES[:1]})
    media = MediaItem(modality="image", digest="0", embeds=item)
    assert mapper.map(media, {"max_slice_nums": 2}).num_embeds == 48
    with pytest.raises(ValueError, match="expected \\(7 slices, 16 queries"):
        mapper.map(media, {})


def test_embeddings_are_split_by_the_engines_option() -> None:
    mapper = ImageMapper(context("minicpmv26", options={"max_slice_nums": 2}))
    items = mapper.split_embeds({"image_embeds": embeds(4), "image_sizes": SIZES})
    assert [len(item["embeds"]) for item in items] == [3, 1]


def test_embeddings_of_a_videos_frames() -> None:
    mapper = VideoMapper(context("minicpmv26"))
    [item] = mapper.split_embeds({"video_embeds": embeds(2), "video_image_sizes": [(112, 84)] * 2})
    mapped = mapper.map(MediaItem(modality="video", digest="0", embeds=item), {})
    assert mapped.num_embeds == 32
    assert mapped.geometry.grids == (None, None)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (embeds(8), "image_sizes"),
        ([embeds(1)], "image_sizes"),
        ({"image_embeds": embeds(8)}, "image_sizes"),
        ({"image_embeds": embeds(8), "image_sizes": SIZES, "image_size_list": SIZES}, "image_sizes"),
        ({"image_embeds": embeds(8), "image_sizes": SIZES, "more": 1}, "more"),
        ({"image_embeds": embeds(9), "image_sizes": SIZES}, r"\[7, 1\] slices, image_embeds has 9"),
        ({"image_embeds": embeds(8).flatten(0, 1)[1:], "image_sizes": SIZES}, "16 queries"),
        ({"image_embeds": "x", "image_sizes": SIZES}, "image_embeds is a str; expected a tensor"),
        ({"image_embeds": embeds(8).to_sparse(), "image_sizes": SIZES}, "dense"),
        ({"image_embeds": [embeds(7)], "image_sizes": SIZES}, "1 tensors for 2"),
        ({"image_embeds": embeds(8), "image_sizes": (320, 213)}, "list of"),
        ({"image_embeds": embeds(8), "image_sizes": [(320, 0), (96, 96)]}, "list of"),
        ({"image_embeds": embeds(8), "image_sizes": [(320.5, 2.0), (96.0, 96.0)]}, "list of"),
        ({"image_embeds": embeds(8), "image_sizes": []}, "list of"),
    ],
)
def test_malformed_embeddings_are_refused(data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ImageMapper(context("minicpmv26")).split_embeds(data)
