"""The OPSIN_MLU_* switches."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from opsin_device_mlu.settings import Settings

GUIDE = Path(__file__).parents[3] / "docs/devices/mlu370.md"


def test_defaults_and_values() -> None:
    assert Settings.read({"OPSIN_PLUGINS": "x"}) == Settings()
    read = Settings.read(
        {
            "OPSIN_MLU_OPS": "0",
            "OPSIN_MLU_DECODE_WINDOW": "-1",
            "OPSIN_MLU_HEAD_SIZES": "128, 64,80",
            "OPSIN_MLU_GRAPHS": "1",
        }
    )
    assert (read.ops, read.decode_window, read.head_sizes, read.graphs) == (False, -1, (64, 80, 128), True)
    assert read.changed() == {
        "OPSIN_MLU_OPS": "False",
        "OPSIN_MLU_DECODE_WINDOW": "-1",
        "OPSIN_MLU_HEAD_SIZES": "(64, 80, 128)",
        "OPSIN_MLU_GRAPHS": "True",
    }
    assert Settings.read({"OPSIN_MLU_DECODE_WINDOW": "auto"}).decode_window is None


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("OPSIN_MLU_OPS", "yes", "expected 0 or 1"),
        ("OPSIN_MLU_DECODE_WINDOW", "1", "expected auto, 0 or -1"),
        ("OPSIN_MLU_HEAD_SIZES", "64,", "head sizes"),
        ("OPSIN_MLU_HEAD_SIZES", "512", "up to 256"),
        ("OPSIN_MLU_OP", "1", "no switch of this device; there are: OPSIN_MLU_OPS"),
    ],
)
def test_impossible_values_are_named(variable: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Settings.read({variable: text})
    assert variable in str(caught.value)


def test_the_guide_describes_every_switch_and_no_other() -> None:
    described = set(re.findall(r"`(OPSIN_MLU_[A-Z0-9_]+)", GUIDE.read_text()))
    assert described == {f"OPSIN_MLU_{field.name.upper()}" for field in fields(Settings)}
