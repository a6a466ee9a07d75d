"""What commands that ask a model have in common: the media that they name, how answers are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.config import MediaLimits
    from opsin.params import SamplingParams


def opened(where: str, kind: str, name: str, limits: MediaLimits) -> dict[str, Any]:
    """A file or `data:` URL as a content part, decoded, so that a bad one is known at once.

    Args:
        where: what an error says first.
        kind: "image" or "video".
        name: the file, folder of frames, or URL.
        limits: sizes that are allowed.

    Raises:
        MediaError: it cannot be read, or is too large.
    """
    from opsin.inputs.media import errors_at, media_item

    with errors_at(f"{where} {name:.80}"):
        return {"type": kind, kind: media_item(kind, name, limits)}


def opened_all(images: Sequence[str], videos: Sequence[str], limits: MediaLimits) -> list[dict[str, Any]]:
    """What `--image` and `--video` name, pictures first."""
    parts = [opened("--image", "image", name, limits) for name in images]
    return parts + [opened("--video", "video", name, limits) for name in videos]


def sampled(
    params: SamplingParams, max_tokens: int, temperature: float | None, seed: int | None
) -> SamplingParams:
    """A checkpoint's own parameters with what the command line says."""
    params = replace(params, max_tokens=max_tokens, seed=seed)
    return params if temperature is None else replace(params, temperature=temperature)


def without_effect(params: SamplingParams) -> str | None:
    """Why a temperature above 0 changes nothing, if so: many checkpoints ask for the best token alone."""
    if params.temperature > 0 and params.top_k == 1:
        return "temperature has no effect, for top_k is 1 in the checkpoint's generation_config"
    return None
