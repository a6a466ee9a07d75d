"""LLaVA-NeXT's any-resolution geometry: which grid of crops a picture gets, and what of it is picture.

The formulas are those of transformers (``image_processing_utils``: ``select_best_resolution``,
``get_patch_output_size``; models/llava_next: ``unpad_image``), reimplemented; they were published with the
LLaVA-NeXT code (haotian-liu/LLaVA, ``mm_utils.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Size = tuple[int, int]
"""(height, width)."""


def best_resolution(size: Size, candidates: Sequence[Size]) -> Size:
    """The canvas that keeps most of the picture's pixels, and wastes least among those; the first wins.

    Args:
        size: of the picture, in pixels.
        candidates: the canvases to choose from, in pixels.
    """
    height, width = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(candidates, key=merit)


def fitted_size(size: Size, canvas: Size) -> Size:
    """The picture's size once it fills the canvas in one direction, its proportions kept."""
    height, width = size
    scale_h, scale_w = canvas[0] / height, canvas[1] / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * scale_h), canvas[1])


@dataclass(frozen=True)
class Grid:
    """The crops of one picture, and which of their features show picture rather than padding.

    Attributes:
        rows, columns: crops.
        top, left: rows of padding at the top (and as many at the bottom), columns at the left (and right).
        side: features along a crop's side.
    """

    rows: int
    columns: int
    top: int
    left: int
    side: int

    @classmethod
    def of(cls, size: Size, canvas: Size, *, crop: int, side: int) -> Grid:
        """The grid of a picture on its canvas.

        Args:
            size: of the picture, in pixels.
            canvas: its `best_resolution`.
            crop: side of a crop, in pixels.
            side: features along it.
        """
        rows, columns = canvas[0] // crop, canvas[1] // crop
        height, width = size
        full_height, full_width = rows * side, columns * side
        top = left = 0
        # Rounded as the model rounds: the features cut off need not be exactly those of padding.
        if width / height > full_width / full_height:
            top = (full_height - int(round(height * (full_width / width), 7))) // 2
        else:
            left = (full_width - int(round(width * (full_height / height), 7))) // 2
        return cls(rows, columns, top, left, side)

    @property
    def height(self) -> int:
        """Rows of features that show picture."""
        return self.rows * self.side - 2 * self.top

    @property
    def width(self) -> int:
        """Columns of features that show picture."""
        return self.columns * self.side - 2 * self.left

    @property
    def num_rows(self) -> int:
        """Features of the unpadded grid, each row closed by one for the line break."""
        return self.height * (self.width + 1)


def grids_of(canvas: Size, *, crop: int, side: int) -> Iterator[Grid]:
    """Every grid that some picture has on a canvas; ``crop`` and ``side`` as in `Grid.of`."""
    rows, columns = canvas[0] // crop, canvas[1] // crop
    yield from (Grid(rows, columns, top, 0, side) for top in range(rows * side // 2 + 1))
    yield from (Grid(rows, columns, 0, left, side) for left in range(1, columns * side // 2 + 1))
