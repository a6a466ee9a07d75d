"""The language model's part of config.json, whichever way it is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.layers import (
    RotaryTable,
    context_length,
    fields,
    sequential_positions,
    switch_lengths,
    text_config,
)

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
            {"rope_type": "default", "rope_theta": 5.0, "mrope_section": [1, 1]},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 7, "factor": 4}},
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
        ({"type": "ntk", "factor": 2.0}, False, "of type 'ntk'; expected one of default, linear, dynamic"),
        ({"rope_type": "llama3", "type": "default"}, False, "several types: llama3, default"),
        ({"factor": 2.0}, False, "of type None"),
        ({"type": "default", "factor": 2.0}, False, "has factor, which its type 'default' does not use"),
        ({"type": "linear"}, False, "factor of .* is None; its type 'linear' expects a positive number"),
        ({"type": "linear", "factor": "2"}, False, "factor of .* is '2'"),
        ({"type": "linear", "factor": 0}, False, "factor of .* is 0;"),
        ({"type": "longrope", "short_factor": [1.0] * 4}, False, "long_factor of .* is None; .*expects 4"),
        ({"type": "default", "partial_rotary_factor": 0.5}, False, "partial_rotary_factor is 0.5; only 1"),
        ({"full_attention": {"rope_type": "default"}}, False, "full_attention is an object"),
        ({"type": "mrope", "mrope_section": [2, 2]}, False, r"mrope_section \[2, 2\]: expected none"),
        ({"type": "yarn", "mrope_section": [1, 1]}, True, r"mrope_section is \[1, 1\]; .* sum is 4"),
        ({"type": "default"}, True, "mrope_section None: expected one"),
    ],
)
def test_other_rotary_positions_are_refused_by_name(rope: dict[str, Any], mrope: bool, words: str) -> None:
    config = {"rope_scaling": rope, "max_position_embeddings": 64}
    with pytest.raises(ValueError, match=words):
        RotaryTable.from_config(text_config(config), 8, "cpu", mrope=mrope)


def test_two_spellings_that_disagree_are_refused() -> None:
    config = {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
        "rope_scaling": {"type": "yarn", "factor": 2.0},
    }
    with pytest.raises(ValueError, match=r"factor is 4.0 in rope_parameters and 2.0 in rope_scaling"):
        text_config(config)
    assert text_config({**config, "text_config": {"rope_scaling": None}})["rope_parameters"] == UNSCALED
    with pytest.raises(ValueError, match="rope_theta is 5.0, in rope_parameters 7"):
        text_config({"rope_parameters": {"rope_theta": 7}, "rope_theta": 5.0})
    name = "original_max_position_embeddings"
    text = text_config({name: 8, "rope_scaling": {"type": "su", name: 9}})
    with pytest.raises(ValueError, match="original_max_position_embeddings is"):
        switch_lengths(text)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"size": "3"}, "^size is '3'; expected an integer$"),
        ({"size": None}, "^size is None; expected an integer$"),
        ({"size": True}, "^size is True; expected an integer$"),
        ({"size": 3.5}, "^size is 3.5; expected an integer$"),
        ({"share": "x"}, "^share is 'x'; expected a number$"),
        ({"flag": 1}, "^flag is 1; expected true or false$"),
        ({"name": 1}, "^name is 1; expected a text$"),
        ({"maybe": "x"}, "^maybe is 'x'; expected an integer or null$"),
        ({"part": {"size": []}}, r"^part.size is \[\]; expected an integer$"),
        ({"part": 3}, "^part is 3; expected an object$"),
    ],
)
def test_a_field_has_the_type_of_its_default(config: dict[str, Any], words: str) -> None:
    defaults = {"size": 3, "share": 0.5, "flag": False, "name": "x", "maybe": int | None}
    with pytest.raises(ValueError, match=words):
        fields(config, defaults, "part" if "part" in config else "")


def test_fields_are_what_is_given_and_the_defaults() -> None:
    defaults = {"size": 3, "share": 0.5, "maybe": int | None}
    assert fields({"share": 1, "more": None}, defaults) == {
        "size": 3,
        "share": 1,
        "maybe": None,
        "more": None,
    }
    assert fields({"part": None}, defaults, "part") == {"size": 3, "share": 0.5, "maybe": None}
    assert fields({"part": {"maybe": 2}}, defaults, "part")["maybe"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        (
            {"layer_types": ["sliding_attention"], "sliding_window": None},
            "sliding_attention with sliding_window None",
        ),
    ],
)
def test_layers_that_see_less_than_the_context_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        text_config(changes)


@pytest.mark.parametrize(
    ("rope", "length", "lines"),
    [
        ({"type": "linear", "factor": 4.0}, 400, ()),
        ({"type": "dynamic", "factor": 4.0}, 100, ()),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, 200, ()),
        ({"type": "yarn", "factor": 4.0}, 400, ()),
        ({"type": "longrope", "original_max_position_embeddings": 50}, 100, (50,)),
    ],
)
def test_scaled_positions_reach_further(rope: dict[str, Any], length: int, lines: tuple[int, ...]) -> None:
    text = text_config({"max_position_embeddings": 100, "rope_scaling": rope})
    assert context_length(text) == length
    assert switch_lengths(text) == lines
    assert sequential_positions(text, 3).prompt.tolist() == [[0, 1, 2]]
