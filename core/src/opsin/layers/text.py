"""What config.json says, in one form whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any

import numpy as np

from opsin.api import Positions

_TEXT_FIELDS: Mapping[str, Any] = {
    "rope_theta": 10000.0,
    "rope_scaling": dict | None,
    "rope_parameters": dict | None,
    "original_max_position_embeddings": int | None,
    "num_key_value_heads": int | None,
    "head_dim": int | None,
    "sliding_window": int | None,
    "use_sliding_window": bool | None,
    "layer_types": list | None,
    "tie_word_embeddings": bool | None,
}
"""What may be null in every family, and the one default that all of them share."""

_SAME_ROPE = {"mrope": "default", "su": "longrope"}
"""Older names of types of rotary positions; ``mrope_section`` says "mrope", too."""

_NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list"}


def fields(given: Mapping[str, Any], defaults: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """The fields of config.json or of an object in it, each of its default's type.

    Args:
        given: config.json, or another of a checkpoint's JSON files.
        defaults: field -> its value where the file leaves it out: that of the family's configuration class.
            A union instead of a value (``int | None``): the field may be null, and is where it is left out.
        section: name of the object in ``given`` whose fields are meant; empty: those of ``given`` itself.

    Returns:
        All fields that are given, and those of ``defaults``.

    Raises:
        ValueError: a field has another type than its default, or is null and may not be.
    """
    if section:
        given = {} if given.get(section) is None else given[section]
        if not isinstance(given, Mapping):
            raise ValueError(f"{section} is {given!r:.80}; expected an object")
    for name in defaults.keys() & given.keys():
        _check_type(f"{section}.{name}" if section else name, given[name], defaults[name])
    return {**_values(defaults), **given}


def _values(defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, UnionType) else value for name, value in defaults.items()}


def _check_type(name: str, value: Any, default: Any) -> None:
    nullable = isinstance(default, UnionType)
    kind = default.__args__[0] if nullable else type(default)
    if value is None and nullable:
        return
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        noun = _NOUNS.get(kind, "an object") + " or null" * nullable
        raise ValueError(f"{name} is {value!r:.80}; expected {noun}")


def text_config(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """The language model's fields, which stand at the top of config.json or under ``text_config``.

    Where both are there, ``text_config`` wins.

    Args:
        config: config.json.
        defaults: see `fields`.

    Returns:
        The fields by the names of config.json; ``tie_word_embeddings`` is true if either level says so, and
        ``rope_parameters`` (as transformers 5 writes it; made of ``rope_scaling`` and ``rope_theta``
        otherwise) always has ``rope_theta`` and ``rope_type``: "default" where positions are not scaled, None
        where they are and nothing says how.

    Raises:
        ValueError: a field cannot be used; the message names it.
    """
    defaults = defaults or {}
    kinds = {**defaults, **_TEXT_FIELDS}
    nested = config.get("text_config") or {}
    fields(config, kinds, "text_config")
    top = {name: value for name, value in config.items() if name != "model_type"}  # it names the whole model
    fields(top, kinds)
    if "rope_parameters" in nested or "rope_scaling" in nested:  # two spellings of one field
        top = {name: value for name, value in top.items() if name not in ("rope_parameters", "rope_scaling")}
    text = {**_values(_TEXT_FIELDS), **_values(defaults), **top, **nested}
    _check_layer_types(text)
    rope = _rope_parameters(text)
    if "rope_theta" in {**top, **nested} and rope["rope_theta"] != text["rope_theta"]:
        raise ValueError(f"rope_theta is {text['rope_theta']}, in rope_parameters {rope['rope_theta']!r}")
    return {
        **text,
        "tie_word_embeddings": bool(text["tie_word_embeddings"] or config.get("tie_word_embeddings")),
        "rope_parameters": rope,
    }


def _rope_parameters(text: Mapping[str, Any]) -> dict[str, Any]:
    sources = [text[name] for name in ("rope_parameters", "rope_scaling") if text[name]]
    rope: dict[str, Any] = {}
    types = []
    for source in sources:
        for name, value in source.items():
            if isinstance(value, Mapping):
                raise ValueError(f"rope_parameters.{name} is an object; kinds of layers are not told apart")
            if name in ("rope_type", "type"):
                _check_type(f"{name} of rope_parameters", value, "")
                types.append(_SAME_ROPE.get(value, value))
            if name not in ("rope_type", "type") and rope.setdefault(name, value) != value:
                raise ValueError(f"{name} is {rope[name]!r} in rope_parameters and {value!r} in rope_scaling")
    if len(set(types)) > 1:
        raise ValueError(
            f"rope_scaling (or rope_parameters) is of several types: {', '.join(map(str, types))}"
        )
    scaled = rope.keys() - {"rope_theta", "mrope_section", "partial_rotary_factor"}
    if "partial_rotary_factor" in text:
        rope.setdefault("partial_rotary_factor", text["partial_rotary_factor"])
    kind = types[0] if types else None if scaled else "default"
    return {"rope_theta": text["rope_theta"], **rope, "rope_type": kind}


def _check_layer_types(text: Mapping[str, Any]) -> None:
    """All layers see all of the context, which `context_length` keeps within the window."""
    kinds = {str(kind) for kind in text["layer_types"] or ()}
    windowed = bool(text["sliding_window"]) and text["use_sliding_window"] is not False
    if not kinds <= {"full_attention", *["sliding_attention"] * windowed}:
        raise ValueError(
            f"layer_types has {', '.join(sorted(kinds))} with sliding_window "
            f"{text['sliding_window']}; expected full_attention, or sliding_attention with a window"
        )


def context_length(text: Mapping[str, Any]) -> int:
    """Longest context of a `text_config`, for `opsin.api.ModelSpec.max_len`.

    Where the model attends within a sliding window, no longer than the window: up to there that is the same
    as attending to everything. Positions scaled by "linear" or "yarn" reach as many times further; "dynamic"
    ones no further, since they would change with every token.
    """
    longest = int(text["max_position_embeddings"])
    rope = text.get("rope_parameters") or {}
    if rope.get("rope_type") in ("linear", "yarn") and rope.get("factor"):
        longest = int(original_length(text) * rope["factor"])
    window = text.get("sliding_window") if text.get("use_sliding_window") is not False else None
    return min(longest, int(window or longest))


def original_length(text: Mapping[str, Any]) -> int:
    """Length of context that a model was trained with, before its rotary positions were scaled.

    Raises:
        ValueError: the two places where it may stand do not agree.
    """
    name = "original_max_position_embeddings"
    given = {
        length
        for length in (text.get(name), (text.get("rope_parameters") or {}).get(name))
        if length is not None
    }
    if len(given) > 1 or not all(isinstance(length, int) for length in given):
        raise ValueError(f"{name} is {' and '.join(map(repr, given))}; expected one integer")
    return given.pop() if given else int(text["max_position_embeddings"])


def switch_lengths(text: Mapping[str, Any]) -> tuple[int, ...]:
    """For `opsin.api.Positions.switch_lengths`: "longrope" has other frequencies for long sequences."""
    return (original_length(text),) if text["rope_parameters"]["rope_type"] == "longrope" else ()


def sequential_positions(text: Mapping[str, Any], num_tokens: int) -> Positions:
    """0, 1, 2, ... on one axis, for `opsin.api.ModelSpec.positions`."""
    return Positions(prompt=np.arange(num_tokens, dtype=np.int64)[None], switch_lengths=switch_lengths(text))
