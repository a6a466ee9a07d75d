"""How a picture is cut: an overview of the whole, and a grid of slices where it is large.

The rules are those of LLaVA-UHD (Xu et al. 2024, section 3.1) as MiniCPM-V's published image processor has
them (openbmb/MiniCPM-V-2_6, image_processing_minicpmv.py), reimplemented. Sizes are (width, height) in
pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Size = tuple[int, int]
Grid = tuple[int, int]


@dataclass(frozen=True)
class Slicer:
    """The settings.

    Attributes:
        resolution: a slice has about the area of a square with this side.
        patch: sides of the overview and of slices are multiples of this.
    """

    resolution: int
    patch: int

    def grid(self, size: Size, max_slices: int) -> Grid | None:
        """(columns, rows) of the slices; None for a picture that is not sliced.

        Among the grids with about as many slices as would cover the picture's area, the one nearest to the
        picture's aspect ratio on a logarithmic scale; the first of equals.
        """
        width, height = size
        wanted = min(math.ceil(width * height / self.resolution**2), max_slices)
        if wanted <= 1:
            return None
        counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= max_slices]
        grids = [
            (columns, count // columns)
            for count in counts
            for columns in range(1, count + 1)
            if count % columns == 0
        ]
        ratio = math.log(width / height)
        return min(grids, key=lambda grid: abs(ratio - math.log(grid[0] / grid[1])))

    def num_slices(self, size: Size, max_slices: int) -> int:
        """How many slices a picture becomes, the overview included."""
        grid = self.grid(size, max_slices)
        return 1 if grid is None else 1 + grid[0] * grid[1]

    def overview(self, size: Size, grid: Grid | None) -> Size:
        """Size of the overview: enlarged if need be where it is the only slice, else only reduced."""
        return self._fitted(size, enlarge=grid is None)

    def cell(self, size: Size, grid: Grid) -> Size:
        """Size of each slice of the grid."""
        width, height = (_multiple(side, count) / count for side, count in zip(size, grid))
        return self._fitted((width, height), enlarge=True)

    def _fitted(self, size: tuple[float, float], *, enlarge: bool) -> Size:
        width, height = size
        if enlarge or width * height > self.resolution**2:
            ratio = width / height
            height = int(self.resolution / math.sqrt(ratio))
            width = int(height * ratio)
        return _multiple(width, self.patch), _multiple(height, self.patch)


def _multiple(length: float, step: int) -> int:
    """The multiple of ``step`` nearest to ``length``, at least one step."""
    return max(round(length / step) * step, step)
