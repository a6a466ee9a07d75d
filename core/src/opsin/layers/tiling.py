"""Pictures cut into tiles of the tower's size, by aspect ratio or by the longest edge; patches joined."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

Array = np.ndarray[Any, Any]
Size = tuple[int, int]
"""(height, width), in pixels."""
Grid = tuple[int, int]
"""Rows and columns of tiles."""


@lru_cache(maxsize=64)
def _grids(least: int, most: int) -> tuple[Grid, ...]:
    """All grids of ``least`` to ``most`` tiles, those of few tiles first and narrow ones before wide ones."""
    grids = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if rows * columns >= least
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def grid_by_aspect_ratio(size: Size, tile: Size, least: int, most: int) -> Grid:
    """The grid whose aspect ratio is nearest to a picture's.

    Among grids that are equally near, a larger one wins while the picture has more than half as many pixels
    as the grid.

    Args:
        size: of the picture.
        tile: of a tile.
        least: fewest tiles.
        most: the same, at least ``least``.

    Source: Chen et al. 2024 (arXiv 2404.16821, section 3.3, "dynamic aspect ratio matching"); ties as in
    transformers, ``get_optimal_tiled_canvas``.
    """
    height, width = size
    best, nearest = (1, 1), math.inf
    for rows, columns in _grids(least, most):
        distance = abs(width / height - columns / rows)
        fills = height * width > 0.5 * tile[0] * tile[1] * columns * rows
        if distance < nearest or (distance == nearest and fills):
            best, nearest = (rows, columns), distance
    return best


def size_by_longest_edge(size: Size, edge: int, most: int | None = None) -> Size:
    """The size of a picture whose longer side becomes ``edge``, its proportions kept.

    The shorter side is rounded down, then up to an even number. If ``edge`` is above ``most``, the result is
    scaled down to it. No side is less than 1.

    Source: transformers, ``get_resize_output_image_size``.
    """
    height, width = size
    ratio = width / height
    if width >= height:
        width, height = edge, int(edge / ratio)
        height += height % 2
    else:
        height, width = edge, int(edge * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    if most is not None and max(height, width) > most:
        ratio = width / height
        height, width = (int(most / ratio), most) if width >= height else (most, int(most * ratio))
    return max(height, 1), max(width, 1)


def grid_by_longest_edge(size: Size, tile: int) -> Grid:
    """The fewest square tiles that hold a picture which is stretched to fill them.

    The longer side is rounded up to whole tiles, the shorter one as it is after scaling by as much.

    Source: transformers, ``resize_for_vision_encoder``.
    """
    height, width = size
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / ratio) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * ratio) / tile)


def resized(pixels: Array, size: Size, resample: Image.Resampling) -> Array:
    """uint8 (H, W, 3) -> uint8 (*size, 3), by PIL."""
    if pixels.shape[:2] == tuple(size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), resample))


def cut_tiles(pixels: Array, tile: Size) -> Array:
    """uint8 (rows * tile height, columns * tile width, 3) -> (rows * columns, *tile, 3), row by row."""
    rows, columns = pixels.shape[0] // tile[0], pixels.shape[1] // tile[1]
    split = pixels.reshape(rows, tile[0], columns, tile[1], 3).swapaxes(1, 2)
    return split.reshape(rows * columns, *tile, 3)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """(images, rows, columns, width) -> (images, rows / factor, columns / factor, width * factor**2).

    Each square of factor x factor patches becomes one row: the states of its patches side by side, row by
    row (space to depth; Shi et al. 2016, the inverse of their periodic shuffling).

    Raises:
        ValueError: rows or columns are not multiples of ``factor``.
    """
    images, rows, columns, width = x.shape
    if rows % factor or columns % factor:
        raise ValueError(f"{rows} x {columns} patches cannot be put together in squares of {factor}")
    squares = x.reshape(images, rows // factor, factor, columns // factor, factor, width)
    return squares.transpose(2, 3).reshape(images, rows // factor, columns // factor, width * factor**2)
