"""Tiles of pictures and squares of patches: rules that can be said in a line, or by slow and obvious code."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opsin.layers import (
    cut_tiles,
    grid_by_aspect_ratio,
    grid_by_longest_edge,
    pixel_shuffle,
    resized,
    size_by_longest_edge,
)

SIDE = st.integers(1, 5000)


@given(height=SIDE, width=SIDE, least=st.integers(1, 4), more=st.integers(0, 9))
def test_no_grid_is_nearer_to_the_aspect_ratio(height: int, width: int, least: int, more: int) -> None:
    most = least + more
    rows, columns = grid_by_aspect_ratio((height, width), (448, 448), least, most)
    assert least <= rows * columns <= most
    nearest = min(
        abs(width / height - c / r)
        for r, c in product(range(1, most + 1), repeat=2)
        if least <= r * c <= most
    )
    assert abs(width / height - columns / rows) == nearest


def test_of_grids_that_are_as_near_the_picture_decides_by_its_pixels() -> None:
    tile = (100, 100)
    assert grid_by_aspect_ratio((100, 100), tile, 1, 12) == (1, 1)
    assert grid_by_aspect_ratio((142, 142), tile, 1, 12) == (2, 2), "more than half of four tiles"
    assert grid_by_aspect_ratio((141, 141), tile, 1, 12) == (1, 1)
    assert grid_by_aspect_ratio((900, 900), tile, 1, 12) == (3, 3)
    assert grid_by_aspect_ratio((100, 900), tile, 1, 12) == (1, 9), "rows first, then columns"
    assert grid_by_aspect_ratio((10, 10), tile, 5, 6) == (3, 2), "2/3 is nearer to 1 than 3/2 is"


@given(height=SIDE, width=SIDE, edge=st.integers(1, 4096))
def test_the_longer_side_becomes_the_edge(height: int, width: int, edge: int) -> None:
    new_height, new_width = size_by_longest_edge((height, width), edge)
    if width >= height:
        assert new_width == max(edge, 1)
        assert new_height == 1 or new_height % 2 == 0
        assert new_height - 2 <= edge * height / width <= new_height + 1
    else:
        assert new_height == edge
        assert new_width == 1 or new_width % 2 == 0
    assert max(size_by_longest_edge((height, width), edge, 1000)) <= max(1000, 2)


@given(height=SIDE, width=SIDE, tile=st.integers(1, 600))
def test_the_grid_holds_the_picture(height: int, width: int, tile: int) -> None:
    rows, columns = grid_by_longest_edge((height, width), tile)
    if width >= height:
        assert columns == math.ceil(width / tile)
        assert rows <= columns
        assert (rows - 1) * tile < columns * tile * height / width + 1
    else:
        assert rows == math.ceil(height / tile)
        assert columns <= rows


def test_tiles_are_cut_row_by_row() -> None:
    pixels = np.arange(4 * 9 * 3, dtype=np.uint8).reshape(4, 9, 3)
    tiles = cut_tiles(pixels, (2, 3))
    assert tiles.shape == (6, 2, 3, 3)
    for number, (row, column) in enumerate(product(range(2), range(3))):
        assert (tiles[number] == pixels[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]).all()


def test_resizing_is_pils() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    lanczos = Image.Resampling.LANCZOS
    assert (
        resized(pixels, (11, 17), lanczos) == np.asarray(Image.fromarray(pixels).resize((17, 11), lanczos))
    ).all()
    assert resized(pixels, (20, 30), lanczos) is pixels


def test_squares_of_patches_stand_side_by_side() -> None:
    x = torch.arange(2 * 4 * 6 * 5).view(2, 4, 6, 5)
    y = pixel_shuffle(x, 2)
    assert y.shape == (2, 2, 3, 20)
    for image, row, column in product(range(2), range(2), range(3)):
        patches = [x[image, 2 * row + a, 2 * column + b] for a in range(2) for b in range(2)]
        assert torch.equal(y[image, row, column], torch.cat(patches))
    assert torch.equal(pixel_shuffle(x, 1), x)
    with pytest.raises(ValueError, match="4 x 6 patches cannot be put together in squares of 4"):
        pixel_shuffle(x, 4)
