"""How pictures are cut: recorded tables, and what holds for every size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin_models_minicpmv.slicing import Slicer

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
REAL = Slicer(resolution=448, patch=14)

sides = st.integers(1, 5000)


@pytest.mark.parametrize(
    ("family", "num_queries"), [("minicpmv20", 64), ("minicpmv25", 96), ("minicpmv26", 64)]
)
def test_sizes_of_the_real_settings(family: str, num_queries: int) -> None:
    rows = json.loads((GOLDEN / family / "size_table_real.json").read_text())["rows"]
    assert len(rows) >= 40
    for row in rows:
        size = (row["width"], row["height"])
        grid = REAL.grid(size, 9)
        assert grid == (tuple(row["grid"]) if row["grid"] else None)
        overview = REAL.overview(size, grid)
        assert list(overview) == row["source_size"]
        assert [overview[1] // 14, overview[0] // 14] == row["source_tgt"]
        assert REAL.num_slices(size, 9) == 1 + row["num_slices"]
        assert REAL.num_slices(size, 9) * num_queries == row["num_feature_tokens"]
        if grid is not None:
            width, height = REAL.cell(size, grid)
            assert [width * grid[0], height * grid[1]] == row["refine_size"]
            assert [height // 14, width // 14] == row["slice_tgt"]


@given(width=sides, height=sides, max_slices=st.integers(1, 25))
def test_grids_are_within_the_limit_and_near_the_ratio(width: int, height: int, max_slices: int) -> None:
    grid = REAL.grid((width, height), max_slices)
    if width * height <= 448**2 or max_slices == 1:
        assert grid is None
        return
    assert grid is not None
    columns, rows = grid
    wanted = min(math.ceil(width * height / 448**2), max_slices)
    assert 2 <= columns * rows <= max_slices
    assert abs(columns * rows - wanted) <= 1

    def error(columns: float, rows: float) -> float:
        return abs(math.log(width / height) - math.log(columns / rows))

    divisors = [count for count in range(1, wanted + 1) if wanted % count == 0]
    assert error(columns, rows) <= min(error(count, wanted // count) for count in divisors)


@given(width=sides, height=sides, max_slices=st.integers(1, 12))
def test_slices_are_whole_patches_of_about_one_area(width: int, height: int, max_slices: int) -> None:
    size = (width, height)
    grid = REAL.grid(size, max_slices)
    shown = [REAL.overview(size, grid)]
    if grid is not None:
        shown.append(REAL.cell(size, grid))
    for slice_width, slice_height in shown:
        assert slice_width % 14 == slice_height % 14 == 0
        assert slice_width >= 14
        assert slice_height >= 14
        # Both sides are rounded to patches; a side of one patch may have been nearly nothing.
        if min(slice_width, slice_height) > 14:
            assert slice_width * slice_height < 448**2 * 1.6


def test_the_overview_is_only_enlarged_where_it_is_alone() -> None:
    assert REAL.overview((100, 100), None) == (448, 448)
    assert REAL.overview((100, 100), (2, 1)) == (98, 98)
    assert REAL.overview((4480, 4480), (3, 3)) == (448, 448)
