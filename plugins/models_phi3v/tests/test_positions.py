"""Rotary tables of the two kinds of sequences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from opsin.layers import RotaryTable
from opsin_models_phi3v.config import language_config
from opsin_models_phi3v.plugin import _positions as positions

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


def rotary_table(config: dict[str, Any]) -> RotaryTable:
    return RotaryTable.from_config(language_config(config), 8, "cpu")


def test_each_token_turns_as_its_sequence_does() -> None:
    table = rotary_table(CONFIG)
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
    assert len(rotary_table(config)(torch.zeros(1, 3).long())) == 2


def test_as_transformers_5_writes_it() -> None:
    scaling = {**CONFIG["rope_scaling"], "rope_type": "longrope", "rope_theta": 10000.0}
    config = {**CONFIG, "rope_scaling": None, "rope_parameters": scaling}
    given, wanted = (rotary_table(c)(torch.tensor([[7, 7], [0, 1]])) for c in (config, CONFIG))
    assert all(torch.equal(one, other) for one, other in zip(given, wanted))


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({**CONFIG["rope_scaling"], "type": "yarn"}, "'yarn' does not use"),
        ({**CONFIG["rope_scaling"], "short_factor": [1.0]}, "short_factor of .*expects 4 numbers"),
    ],
)
def test_other_scalings_are_refused(scaling: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rotary_table({**CONFIG, "rope_scaling": scaling})
