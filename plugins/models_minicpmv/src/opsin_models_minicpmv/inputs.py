"""Pictures, videos and embeddings -> slices of patches; placeholders -> marks and unknown tokens per slice.

The formulas are those of the family's published processors (openbmb/MiniCPM-V-2, MiniCPM-Llama3-V-2_5 and
MiniCPM-V-2_6: image_processing_minicpmv.py, processing_minicpmv.py), reimplemented.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.api import Expansion, InputContext, MappedMedia, MediaItem, Modality, Placeholder
from opsin.layers import fields, flatten_patches, pixel_levels, pixel_values
from opsin_models_minicpmv.config import top_config, vision_config
from opsin_models_minicpmv.slicing import Grid, Size, Slicer
from opsin_models_minicpmv.versions import version_of

Array = np.ndarray[Any, Any]

HALF = [0.5, 0.5, 0.5]


@dataclass(frozen=True, kw_only=True)
class Slices:
    """The geometry of one item: a picture, or a video's frames.

    Attributes:
        sizes: (width, height) of each picture.
        grids: of each picture, see `Slicer.grid`.
        patches: (rows, columns) of patches of each slice, pictures one after another, each with its
            overview first; empty for ready-made embeddings.
        numbered: whether the item's number is written before it.
    """

    sizes: tuple[Size, ...]
    grids: tuple[Grid | None, ...]
    patches: tuple[tuple[int, int], ...]
    numbered: bool


SETTINGS: Mapping[str, Any] = {
    "scale_resolution": 448,
    "patch_size": 14,
    "max_slice_nums": 9,
    "slice_mode": True,
    "use_image_id": True,
    "norm_mean": HALF,
    "norm_std": HALF,
}
"""Source: MiniCPMVImageProcessor of the three repositories."""

_MARKS: Mapping[str, str] = {
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "unk": "<unk>",
    "im_id_start": "<image_id>",
    "im_id_end": "</image_id>",
}


def settings_of(context: InputContext) -> Mapping[str, Any]:
    """Where the versions keep them: preprocessor_config.json, or config.json's slice_config or top level.

    Raises:
        ValueError: a setting cannot be used, or does not go with the model.
    """
    nullable = {name: type(value) | None for name, value in SETTINGS.items()}
    found = dict(SETTINGS)
    for source, section in (
        (context.config, ""),
        (context.config, "slice_config"),
        (context.preprocessor, ""),
    ):
        given = fields(source, nullable, section)
        found.update({name: given[name] for name in SETTINGS if given[name] is not None})
    for name in ("scale_resolution", "patch_size", "max_slice_nums"):
        if found[name] < 1:
            raise ValueError(f"{name} is {found[name]}; expected a positive integer")
    patch, queries = vision_config(context.config).patch_size, top_config(context.config)["query_num"]
    per_slice = fields(context.preprocessor, {"image_feature_size": queries})["image_feature_size"]
    if found["patch_size"] != patch or per_slice != queries:
        raise ValueError(
            f"patch_size is {found['patch_size']} and image_feature_size {per_slice}; the model has patches "
            f"of {patch} pixels and query_num {queries}"
        )
    return found


class _Mapper:
    """Images and videos: both are pictures, cut into slices."""

    modality: Modality
    size_names: tuple[str, ...]
    size_option = "max_slice_nums"

    def __init__(
        self, context: InputContext, settings: Mapping[str, Any], *, max_slices: int, numbered: bool
    ) -> None:
        numbers = version_of(context.config) == "2.6"
        self.option_names = frozenset({"max_slice_nums", "use_image_id"} if numbers else {"max_slice_nums"})
        self._num_queries: int = top_config(context.config)["query_num"]
        self._slicer = Slicer(settings["scale_resolution"], settings["patch_size"])
        try:
            self._levels = pixel_levels(
                {f"image_{name}": settings[f"norm_{name}"] for name in ("mean", "std")}
            )
        except ValueError as error:
            raise ValueError(f"norm_mean and norm_std: {error}") from error
        self._defaults = {
            # A checkpoint that does not slice sees every picture whole.
            "max_slice_nums": max_slices if settings["slice_mode"] else 1,
            "use_image_id": numbered and numbers,
        }
        self._engine_options = context.options

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        """See `opsin.api.InputMapper.map`; the geometry is `Slices`."""
        max_slices, numbered = self._read(options)
        if item.embeds is not None:
            return self._map_embeds(item.embeds, max_slices, numbered)
        assert item.pixels is not None
        frames = item.pixels if item.pixels.ndim == 4 else item.pixels[None]
        height, width = frames.shape[1:3]
        size = (width, height)
        grid = self._slicer.grid(size, max_slices)
        patches, shapes = [], []
        for frame in frames:
            rows, counts = self._sliced(Image.fromarray(frame), size, grid)
            patches += rows
            shapes += counts
        return MappedMedia(
            num_embeds=len(shapes) * self._num_queries,
            tensors={"patches": torch.cat(patches)},
            geometry=Slices(
                sizes=(size,) * len(frames),
                grids=(grid,) * len(frames),
                patches=tuple(shapes),
                numbered=numbered,
            ),
        )

    def count_embeds(self, width: int, height: int, frames: int, options: Mapping[str, Any]) -> int:
        """See `opsin.api.EmbedCounter`."""
        max_slices, _ = self._read(options)
        return frames * self._slicer.num_slices((width, height), max_slices) * self._num_queries

    def _sliced(
        self, picture: Image.Image, size: Size, grid: Grid | None
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Patches float32 (P, 3 * patch**2) of a picture's slices, and (rows, columns) of each slice."""
        patch = self._slicer.patch
        width, height = self._slicer.overview(size, grid)
        patches = [self._patches(_resized(picture, (width, height))[None])]
        shapes = [(height // patch, width // patch)]
        if grid is not None:
            columns, rows = grid
            width, height = self._slicer.cell(size, grid)
            whole = _resized(picture, (width * columns, height * rows))
            cells = whole.reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4)
            patches.append(self._patches(cells.reshape(rows * columns, height, width, 3)))
            shapes += [(height // patch, width // patch)] * (rows * columns)
        return patches, shapes

    def _patches(self, pictures: Array) -> Tensor:
        """uint8 (n, height, width, 3) -> float32 (patches, 3 * patch**2)."""
        return flatten_patches(pixel_values(pictures, self._levels), self._slicer.patch)

    def _read(self, options: Mapping[str, Any]) -> tuple[int, bool]:
        """(max_slice_nums, use_image_id) after the user's options.

        Raises:
            ValueError: they are not a positive integer and a truth value.
        """
        values = {**self._defaults, **options}
        max_slices, numbered = values["max_slice_nums"], values["use_image_id"]
        if isinstance(max_slices, bool) or not isinstance(max_slices, int) or max_slices < 1:
            raise ValueError(f"max_slice_nums={max_slices!r}: expected an integer, at least 1")
        if not isinstance(numbered, bool):
            raise ValueError(f"use_image_id={numbered!r}: expected True or False")
        return max_slices, numbered

    # ---- ready-made embeddings ----------------------------------------------------------------

    def _map_embeds(self, given: Mapping[str, Tensor], max_slices: int, numbered: bool) -> MappedMedia:
        embeds = given["embeds"]
        sizes = tuple((int(width), int(height)) for width, height in given["sizes"])
        expected = sum(self._slicer.num_slices(size, max_slices) for size in sizes)
        if embeds.shape[:2] != (expected, self._num_queries):
            raise ValueError(
                f"{self.modality}_embeds {tuple(embeds.shape)} for sizes {list(sizes)} and max_slice_nums "
                f"{max_slices}: expected ({expected} slices, {self._num_queries} queries, hidden)"
            )
        return MappedMedia(
            num_embeds=expected * self._num_queries,
            embeds=embeds.flatten(0, 1),
            geometry=Slices(
                sizes=sizes,
                grids=tuple(self._slicer.grid(size, max_slices) for size in sizes),
                patches=(),
                numbered=numbered,
            ),
        )

    def _read_embeds(self, data: Any) -> tuple[Any, list[Size]]:
        """(embeddings as given, sizes) of a user's dict.

        Raises:
            ValueError: it has other keys, or the sizes are none.
        """
        name = f"{self.modality}_embeds"
        found = [key for key in self.size_names if isinstance(data, Mapping) and key in data]
        if len(found) != 1 or set(data) != {name, found[0]}:
            got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f"{self.modality} embeddings of this family are a dict with {name} (slices, queries, hidden) "
                f"and {' or '.join(self.size_names)}, the (width, height) of each picture; got {got}"
            )
        sizes = np.asarray(data[found[0]])
        if sizes.ndim != 2 or sizes.shape[1] != 2 or sizes.dtype.kind not in "iu" or bool((sizes < 1).any()):
            raise ValueError(f"{found[0]} {data[found[0]]!r}: expected a list of (width, height) in pixels")
        return data[name], [(int(width), int(height)) for width, height in sizes]

    def _checked(self, embeds: Any) -> Tensor:
        """(slices, queries, H), of that or of (slices * queries, H)."""
        name = f"{self.modality}_embeds"
        try:
            tensor = torch.as_tensor(embeds)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} is a {type(embeds).__name__}; expected a tensor") from error
        if tensor.layout == torch.strided and tensor.ndim == 2 and len(tensor) % self._num_queries == 0:
            tensor = tensor.unflatten(0, (-1, self._num_queries))
        if tensor.layout != torch.strided or tensor.ndim != 3:
            raise ValueError(
                f"{name} is a {tensor.layout} tensor {tuple(tensor.shape)}; expected a dense one, "
                f"(slices, {self._num_queries} queries, hidden) or (slices * {self._num_queries}, hidden)"
            )
        return tensor


class ImageMapper(_Mapper):
    """Images: an overview, and up to ``max_slice_nums`` slices."""

    modality = "image"
    size_names = ("image_sizes", "image_size_list")

    def __init__(self, context: InputContext) -> None:
        settings = settings_of(context)
        numbered = settings["use_image_id"]
        super().__init__(context, settings, max_slices=settings["max_slice_nums"], numbered=numbered)

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """``{"image_embeds": ..., "image_sizes": [(width, height), ...]}`` -> one item per size.

        The embeddings are one tensor (slices of all images, queries, hidden), or a list with a tensor for
        each image.
        """
        embeds, sizes = self._read_embeds(data)
        if isinstance(embeds, (list, tuple)):
            parts = [self._checked(part) for part in embeds]
            if len(parts) != len(sizes):
                raise ValueError(f"image_embeds has {len(parts)} tensors for {len(sizes)} image sizes")
        else:
            parts = self._split(self._checked(embeds), sizes)
        return [
            {"embeds": part, "sizes": torch.tensor([size])} for part, size in zip(parts, sizes, strict=True)
        ]

    def _split(self, embeds: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        if len(sizes) == 1:
            return [embeds]
        max_slices, _ = self._read(self._engine_options)
        counts = [self._slicer.num_slices(size, max_slices) for size in sizes]
        if sum(counts) != len(embeds):
            raise ValueError(
                f"images of sizes {list(sizes)} have {counts} slices, image_embeds has {len(embeds)}; for "
                "embeddings made with another max_slice_nums, pass a list with a tensor for each image"
            )
        return list(embeds.split(counts))


class VideoMapper(_Mapper):
    """Videos: every frame is a picture, of few slices and not numbered."""

    modality = "video"
    size_names = ("video_image_sizes", "image_sizes", "image_size_list")

    def __init__(self, context: InputContext) -> None:
        super().__init__(context, settings_of(context), max_slices=2, numbered=False)

    def split_embeds(self, data: Any) -> Sequence[Mapping[str, Tensor]]:
        """``{"video_embeds": (slices, queries, hidden), "video_image_sizes": [(width, height), ...]}``.

        One video with the sizes of its frames; several videos are a list of such dicts.
        """
        embeds, sizes = self._read_embeds(data)
        return [{"embeds": self._checked(embeds), "sizes": torch.tensor(sizes)}]


def _resized(picture: Image.Image, size: Size) -> Array:
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def placeholder(context: InputContext, text: str) -> Placeholder:
    """One mark in the text becomes, for each slice, marks around one token per embedding."""
    given = fields(context.preprocessor, dict.fromkeys(_MARKS, str | None))
    marks = {name: given[name] or mark for name, mark in _MARKS.items()}
    picture = marks["im_start"] + marks["im_end"]
    bare = marks["slice_start"] + marks["slice_end"]
    nested = version_of(context.config) != "2.6"
    tokenizer = context.tokenizer
    for name, mark in marks.items():
        if tokenizer.decode([tokenizer.convert_tokens_to_ids(mark)]) != mark and (
            not nested or "id" not in name
        ):
            raise ValueError(f"{name} is {mark!r}, which is no token of the tokenizer")
    unknown = tokenizer.convert_tokens_to_ids(marks["unk"])
    openers = {tokenizer.convert_tokens_to_ids(marks["im_start"])}
    if not nested:
        openers.add(tokenizer.convert_tokens_to_ids(marks["slice_start"]))
    num_queries = top_config(context.config)["query_num"]

    def of_picture(grid: Grid | None) -> str:
        if grid is None:
            return picture
        columns, rows = grid
        if nested:
            cells = "\n".join([picture * columns] * rows)
            return f"{picture}{marks['slice_start']}{cells}{marks['slice_end']}"
        return picture + "\n".join([bare * columns] * rows)

    def expand(mapped: MappedMedia, number: int) -> Expansion:
        slices: Slices = mapped.geometry
        number_text = f"{marks['im_id_start']}{number - 1}{marks['im_id_end']}" if slices.numbered else ""
        skeleton = number_text + "\n".join(of_picture(grid) for grid in slices.grids)
        token_ids: list[int] = []
        is_embed: list[bool] = []
        for token in tokenizer.encode(skeleton, add_special_tokens=False):
            token_ids.append(token)
            is_embed.append(False)
            if token in openers:
                token_ids += [unknown] * num_queries
                is_embed += [True] * num_queries
        return Expansion(token_ids=token_ids, is_embed=is_embed)

    return Placeholder(text=lambda number: text, expand=expand)
