"""The content of a chat message -> text and media parts.

==================  ======================================================================================
``type``            its value, under the key of the same name unless said otherwise
==================  ======================================================================================
text, input_text    ``text``: a string
image_url           ``{"url": ...}``: a ``data:`` or http(s) URL
input_image         ``image_url``: the URL as a string
image, image_pil    whatever `opsin.media.image_item` takes
video_url           ``{"url": ...}`` of a video file
video               frames, or whatever else `opsin.media.video_item` takes
image_embeds,       ready-made embeddings of one item, in the layout of the model family
video_embeds
==================  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.api import Modality
from opsin.config import MediaLimits
from opsin.errors import MediaError, RequestError, require_known
from opsin.inputs.media import Fetch, errors_at, image_item, video_item


@dataclass(frozen=True)
class MediaPart:
    """A media part, not decoded yet.

    Attributes:
        where: its place, for messages, e.g. ``messages[0].content[1]``.
        modality: what it is.
        value: what the user gave.
        is_embeds: whether the value is ready-made embeddings.
    """

    where: str
    modality: Modality
    value: Any
    is_embeds: bool = False

    def load(self, limits: MediaLimits, fetch: Fetch | None, local_files: bool) -> Any:
        """A `MediaItem`, or the embeddings as they were given: only the model's mapper knows their layout.

        Raises:
            MediaError: the item cannot be used.
        """
        if self.is_embeds:
            # Further on, text or bytes would be taken for a file's name or content.
            if isinstance(self.value, (str, bytes, bytearray, Path)):
                raise MediaError(
                    f"{self.where}: got embeddings as a {type(self.value).__name__}; expected tensors"
                )
            return self.value
        build = image_item if self.modality == "image" else video_item
        with errors_at(self.where):
            return build(self.value, limits, fetch=fetch, local_files=local_files)


Part = str | MediaPart


def parse_content(where: str, content: Any) -> list[Part]:
    """Parts of a message's content, which is text, a list of parts, or None (no parts).

    Raises:
        RequestError: a part is malformed; the message names it by ``where``.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise RequestError(f"{where} is a {type(content).__name__}; expected text or a list of parts")
    return [_parse_part(f"{where}[{index}]", part) for index, part in enumerate(content)]


def _parse_part(where: str, part: Any) -> Part:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestError(f"{where} is a {type(part).__name__}; expected a dict with a type")
    kind = part.get("type")
    require_known(f"{where}.type", [kind], _PARSERS, RequestError)
    return _PARSERS[str(kind)](where, part)


def _text(where: str, part: Mapping[str, Any]) -> str:
    value = part.get("text")
    if not isinstance(value, str):
        raise RequestError(f"{where}.text is a {type(value).__name__}; expected a string")
    return value


def _url(modality: Modality, key: str) -> Callable[[str, Mapping[str, Any]], MediaPart]:
    def parse(where: str, part: Mapping[str, Any]) -> MediaPart:
        value = part.get(key)
        url = value.get("url") if isinstance(value, Mapping) else None
        if not isinstance(url, str):
            raise RequestError(f'{where}.{key} must be a dict with a string: {{"url": ...}}')
        return MediaPart(where, modality, url)

    return parse


def _input_image(where: str, part: Mapping[str, Any]) -> MediaPart:
    url = part.get("image_url")
    if not isinstance(url, str):
        raise RequestError(f"{where}.image_url is a {type(url).__name__}; expected the URL as a string")
    return MediaPart(where, "image", url)


def _value(
    modality: Modality, key: str, *, is_embeds: bool = False
) -> Callable[[str, Mapping[str, Any]], MediaPart]:
    def parse(where: str, part: Mapping[str, Any]) -> MediaPart:
        if part.get(key) is None:
            raise RequestError(f"{where} has no {key!r}; expected the {modality} there")
        return MediaPart(where, modality, part[key], is_embeds)

    return parse


_PARSERS: Mapping[str, Callable[[str, Mapping[str, Any]], Part]] = {
    "text": _text,
    "input_text": _text,
    "image_url": _url("image", "image_url"),
    "input_image": _input_image,
    "image": _value("image", "image"),
    "image_pil": _value("image", "image_pil"),
    "video_url": _url("video", "video_url"),
    "video": _value("video", "video"),
    "image_embeds": _value("image", "image_embeds", is_embeds=True),
    "video_embeds": _value("video", "video_embeds", is_embeds=True),
}
