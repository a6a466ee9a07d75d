"""Rotary tables of the two kinds of sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from opsin.layers import RotaryTable
from opsin_models_phi3v.positions import positions, rotary_table

CONFIG: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.05, 1.0, 1.3, 2.0],
        "long_factor": [1.0, 2.0, 8.0, 32.0],
    },
}


def test_each_token_turns_as_its_sequence_does() -> None:
    table = rotary_table(CONFIG, 8, "cpu")
    cos, sin = table(torch.tensor([[0, 7, 7, 5000], [0, 0, 1, 1]]))
    attention = math.sqrt(1 + math.log(32) / math.log(4096))
    assert attention == pytest.approx(1.1902, abs=1e-4)
    for row, (position, kind) in enumerate([(0, "short"), (7, "short"), (7, "long"), (5000, "long")]):
        for i, factor in enumerate(CONFIG["rope_scaling"][f"{kind}_factor"]):
            angle = position / (factor * 10000 ** (i / 4))
            for column in (i, i + 4):
                assert float(cos[row, column]) == pytest.approx(attention * math.cos(angle), abs=1e-3)
                assert float(sin[row, column]) == pytest.approx(attention * math.sin(angle), abs=1e-3)


def test_positions_count_up_and_name_the_line() -> None:
    found = positions(CONFIG, [5, 6, 7], [])
    assert found.prompt.tolist() == [[0, 1, 2]]
    assert (found.delta, found.switch_lengths) == (0, (4096,))


def test_without_scaling_there_is_one_kind() -> None:
    config = {**CONFIG, "rope_scaling": None}
    assert positions(config, [5, 6], []).switch_lengths == ()
    assert isinstance(rotary_table(config, 8, "cpu"), RotaryTable)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0},
        {**CONFIG["rope_scaling"], "type": "yarn"},
        {**CONFIG["rope_scaling"], "short_factor": [1.0]},
    ],
)
def test_other_scalings_are_refused(scaling: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'su' or 'longrope' with 4 of each"):
        rotary_table({**CONFIG, "rope_scaling": scaling}, 8, "cpu")
