"""The table of pixel levels against transformers' rescale and normalize."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers.image_transforms import normalize, rescale

from opsin.layers import pixel_levels, pixel_values

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 17, 16, 3), dtype=np.uint8)
PIXELS[0].reshape(-1)[: 3 * 256] = np.arange(256, dtype=np.uint8).repeat(3)  # every level of every channel


@pytest.mark.parametrize(
    "settings",
    [
        {
            "rescale_factor": 1 / 255,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.3, 0.2, 0.1],
        },
        {"rescale_factor": 0.00392156862745098, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
        {"do_rescale": False, "image_mean": [100, 110, 120], "image_std": [50, 60, 70]},
    ],
)
def test_values_are_transformers_to_the_last_bit(settings: dict[str, Any]) -> None:
    expected: Any = PIXELS[0].transpose(2, 0, 1)
    if settings.get("do_rescale", True):
        expected = rescale(expected, settings["rescale_factor"], input_data_format="channels_first")
    if settings.get("do_normalize", True):
        expected = normalize(
            expected, settings["image_mean"], settings["image_std"], input_data_format="channels_first"
        )
    given = pixel_values(PIXELS, pixel_levels(settings))
    assert given.shape == (2, 3, 17, 16)
    assert np.array_equal(given[0].numpy(), expected.astype(np.float32))


def test_defaults_are_clips_and_can_be_others() -> None:
    assert pixel_levels({})[0, 0] == pytest.approx(-0.48145466 / 0.26862954)
    assert pixel_levels({})[2, 255] == pytest.approx((1 - 0.40821073) / 0.27577711)
    other = pixel_levels({}, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert other[:, 0].tolist() == [-1.0] * 3
    assert other[:, 255].tolist() == [1.0] * 3
