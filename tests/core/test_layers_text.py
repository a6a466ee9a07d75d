"""The language model's part of config.json, whichever way it is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.layers import RotaryTable, context_length, text_config

UNSCALED = {"rope_type": "default", "rope_theta": 10000.0}


def test_fields_come_from_text_config_then_the_top_then_the_defaults() -> None:
    config = {"hidden_size": 1, "vocab_size": 2, "text_config": {"hidden_size": 3, "model_type": "inner"}}
    text = text_config({**config, "model_type": "outer"}, {"vocab_size": 4, "num_hidden_layers": 5})
    assert (text["hidden_size"], text["vocab_size"], text["num_hidden_layers"]) == (3, 2, 5)
    assert text["model_type"] == "inner"
    assert "model_type" not in text_config({"model_type": "outer"})
    assert text_config({"text_config": None})["rope_parameters"] == UNSCALED


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, UNSCALED),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"text_config": {"rope_theta": 5}, "rope_theta": 6}, {"rope_type": "default", "rope_theta": 5.0}),
        (
            {"rope_theta": 5, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}},
            {"type": "mrope", "rope_type": "mrope", "rope_theta": 5.0, "mrope_section": [1, 1]},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 7, "factor": 4}, "rope_theta": 5},
            {"rope_type": "yarn", "rope_theta": 7.0, "factor": 4},
        ),
        ({"rope_parameters": {"rope_theta": 7}}, {"rope_type": "default", "rope_theta": 7.0}),
        ({"rope_scaling": {"factor": 2.0}}, {"rope_type": None, "rope_theta": 10000.0, "factor": 2.0}),
    ],
)
def test_rotary_settings_have_one_form(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert text_config(config)["rope_parameters"] == expected


def test_the_family_says_the_base_that_the_file_leaves_out() -> None:
    assert text_config({}, {"rope_theta": 1e6})["rope_parameters"]["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}, True),
        ({"text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
    ],
)
def test_a_head_is_tied_if_either_level_says_so(config: dict[str, Any], tied: bool) -> None:
    assert text_config(config)["tie_word_embeddings"] is tied


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 100),
        ({"sliding_window": 40}, 40),
        ({"sliding_window": 400}, 100),
        ({"sliding_window": None}, 100),
        ({"sliding_window": 40, "use_sliding_window": False}, 100),
    ],
)
def test_a_context_is_no_longer_than_the_window(changes: dict[str, Any], length: int) -> None:
    assert context_length({"max_position_embeddings": 100, **changes}) == length


@pytest.mark.parametrize("kind", ["default", "mrope"])
def test_a_table_of_several_axes_has_their_sections(kind: str) -> None:
    text = text_config({"rope_theta": 100.0, "rope_scaling": {"type": kind, "mrope_section": [1, 1, 2]}})
    table = RotaryTable.from_config(text, 8, "cpu", mrope=True)
    positions = torch.tensor([[3], [5], [7]])
    for given, wanted in zip(table(positions), RotaryTable(8, 100.0, sections=[1, 1, 2])(positions)):
        torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize(
    ("rope", "mrope", "words"),
    [
        (
            {"type": "linear", "factor": 2.0},
            False,
            "rope_scaling .* of type 'linear'.*expected type 'default'",
        ),
        ({"rope_type": "llama3", "type": "default"}, False, "'llama3'"),
        ({"factor": 2.0}, False, "of type None"),
        ({"type": "mrope", "mrope_section": [1, 1]}, False, "'mrope'"),
        (
            {"type": "default", "mrope_section": [1, 1]},
            False,
            r"\[1, 1\]: expected.*without an mrope_section",
        ),
        ({"type": "yarn", "mrope_section": [1, 1]}, True, "'yarn'.*expected type 'default' or 'mrope'"),
        ({"type": "default"}, True, "mrope_section None: expected.*with an mrope_section"),
    ],
)
def test_other_rotary_positions_are_refused_by_name(rope: dict[str, Any], mrope: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RotaryTable.from_config(text_config({"rope_scaling": rope}), 8, "cpu", mrope=mrope)
