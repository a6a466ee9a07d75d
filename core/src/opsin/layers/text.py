"""What config.json says about the language model, in one form whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_config(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """The language model's fields, which stand at the top of config.json or under ``text_config``.

    Where both are there, ``text_config`` wins.

    Args:
        config: config.json.
        defaults: values of fields that the file leaves out: those of the family's configuration class.

    Returns:
        The fields by the names of config.json; ``tie_word_embeddings`` is true if either level says so,
        and ``rope_parameters`` (as transformers 5 writes it; made of ``rope_scaling`` and ``rope_theta``
        otherwise) always has ``rope_theta`` and ``rope_type``: "default" where positions are not scaled, None
        where they are and nothing says how.
    """
    nested = config.get("text_config") or {}
    top = {name: value for name, value in config.items() if name != "model_type"}  # it names the whole model
    text = {**(defaults or {}), **top, **nested}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    unscaled = None if rope.keys() - {"rope_theta", "mrope_section"} else "default"
    return {
        **text,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings")),
        "rope_parameters": {
            **rope,
            "rope_type": rope.get("rope_type") or rope.get("type") or unscaled,
            "rope_theta": float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0),
        },
    }


def context_length(text: Mapping[str, Any]) -> int:
    """Longest context of a `text_config`, for `opsin.api.ModelSpec.max_len`.

    Where the model attends within a sliding window, no longer than the window: up to there that is the same
    as attending to everything.
    """
    longest = int(text["max_position_embeddings"])
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    return min(longest, int(window or longest))
