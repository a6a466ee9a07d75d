"""What pictures and videos are written as: rows and columns of squares, frames and their times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from opsin.api import InputContext, MappedMedia, Placeholder, expand_by_text
from opsin.layers import fields
from opsin_models_smolvlm.config import TOP

IMAGE, VIDEO = "<image>", "<video>"
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
DEFAULT_FPS = 24.0
"""Of frames whose times nobody knows, as in transformers."""


@dataclass(frozen=True)
class Squares:
    """How a picture was cut.

    Attributes:
        rows, columns: of squares; none where it is one square as a whole.
        per_square: embeddings of a square.
    """

    rows: int
    columns: int
    per_square: int


@dataclass(frozen=True)
class Clip:
    """The frames of a video.

    Attributes:
        seconds: at which each of them is shown.
        duration: of the whole video, in seconds.
        per_square: embeddings of a frame.
    """

    seconds: tuple[float, ...]
    duration: float
    per_square: int


_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """An integer from 0 to 999,999 in English words, as the package num2words writes it."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, units = divmod(number, 10)
        return _TENS[tens] + (f"-{_UNITS[units]}" if units else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_UNITS[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    link = "" if not rest else ", " if rest >= 100 else " and "
    return f"{in_words(thousands)} thousand{link}{in_words(rest) if rest else ''}"


def image_text(squares: Squares) -> str:
    """A picture: its squares row by row with their places, then the whole as one square.

    Source: transformers, models/idefics3, ``Idefics3Processor.replace_image_token``.
    """
    embeds = IMAGE * squares.per_square
    whole = f"{AROUND}{WHOLE}{embeds}{AROUND}"
    if not squares.rows:
        return whole
    lines = (
        "".join(f"{AROUND}<row_{row}_col_{column}>{embeds}" for column in range(1, squares.columns + 1))
        for row in range(1, squares.rows + 1)
    )
    return "".join(f"{line}\n" for line in lines) + f"\n{whole}"


def video_text(clip: Clip) -> str:
    """A video: how many frames of how long a video they are, and the time in front of each.

    Source: transformers, models/smolvlm, ``SmolVLMProcessor.replace_video_token``.
    """
    length = timedelta(seconds=int(clip.duration))
    frame = image_text(Squares(0, 0, clip.per_square))
    times = (f"{int(second // 60):02d}:{int(second % 60):02d}" for second in clip.seconds)
    return (
        f"You are provided the following series of {in_words(len(clip.seconds))} frames from a {length} "
        "[H:MM:SS] video.\n" + "".join(f"\nFrame from {time}:{frame}" for time in times) + "\n\n"
    )


def _placeholder(context: InputContext, text: str, written: Callable[[Any], str]) -> Placeholder:
    def expand_text(mapped: MappedMedia, _number: int) -> str:
        return written(mapped.geometry)

    embed = _token(context, IMAGE, fields(context.config, TOP))
    return Placeholder(
        text=lambda number: text,
        expand=expand_by_text(context.tokenizer, expand_text, embed),
        token_id=embed if text == IMAGE else _single(context, text),
        expand_text=expand_text,
        embed_token_id=embed,
    )


def _token(context: InputContext, text: str, given: Mapping[str, Any]) -> int:
    token = given["image_token_id"]
    return context.tokenizer.convert_tokens_to_ids(text) if token is None else int(token)


def _single(context: InputContext, text: str) -> int | None:
    """The id of a text that is one token; a tokenizer of SmolVLM (the first) has none for videos."""
    ids: Sequence[int] = context.tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


def image_placeholder(context: InputContext) -> Placeholder:
    """``<image>``, which becomes squares."""
    return _placeholder(context, IMAGE, image_text)


def video_placeholder(context: InputContext) -> Placeholder:
    """``<video>``, which becomes frames and words about them."""
    return _placeholder(context, VIDEO, video_text)
