"""A conversation, parsed once: messages of text and media parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any, Literal, cast, get_args

from opsin.api import Modality
from opsin.errors import MediaError, RequestError, require_known

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


@dataclass(frozen=True)
class PartType:
    """How one type of content part is written.

    Attributes:
        key: key of its value.
        modality: modality of the item; None for text.
        form: form of the value: a string, ``{"url": string}``, or any object.
        is_embeds: whether the value is ready-made embeddings.
    """

    key: str
    modality: Modality | None
    form: Literal["string", "url", "object"]
    is_embeds: bool = False


PART_TYPES: Mapping[str, PartType] = {
    "text": PartType("text", None, "string"),
    "input_text": PartType("text", None, "string"),
    "image_url": PartType("image_url", "image", "url"),
    "input_image": PartType("image_url", "image", "string"),
    "image": PartType("image", "image", "object"),
    "image_pil": PartType("image_pil", "image", "object"),
    "video_url": PartType("video_url", "video", "url"),
    "video": PartType("video", "video", "object"),
    "image_embeds": PartType("image_embeds", "image", "object", is_embeds=True),
    "video_embeds": PartType("video_embeds", "video", "object", is_embeds=True),
}
"""A URL is a ``data:`` or http(s) URL; a picture or video as an object is whatever
`opsin.inputs.media.open_media` takes; embeddings are those of one item, in the layout of the model family. A
video of frames may say its ``fps``."""

SIZE_FIELDS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
NO_SIZE = "a part has no size of its own; mm_processor_kwargs holds for all media of the request"


@dataclass(frozen=True)
class MediaPart:
    """A media part, not decoded yet.

    Attributes:
        where: place of the part, for error messages, e.g. ``messages[0].content[1]``.
        modality: modality of the item.
        value: value as the user gave it.
        is_embeds: whether the value is ready-made embeddings.
    """

    where: str
    modality: Modality
    value: Any
    is_embeds: bool = False


Part = str | MediaPart


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        fields: all fields but the content and those that are None.
        parts: parts of the content; none where it is absent.
    """

    fields: Mapping[str, Any]
    parts: tuple[Part, ...]

    @property
    def media(self) -> list[MediaPart]:
        """The media parts, in order."""
        return [part for part in self.parts if isinstance(part, MediaPart)]

    @property
    def role(self) -> Role:
        """Who speaks."""
        return cast(Role, self.fields["role"])

    @property
    def text(self) -> str:
        """The text parts, joined by line breaks."""
        return "\n".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Conversation:
    """Messages whose form has been checked."""

    messages: tuple[Message, ...]

    @classmethod
    def parse(cls, messages: Any) -> Conversation:
        """OpenAI-style messages: ``{"role": ..., "content": text or list of parts}``; see `PART_TYPES`.

        Raises:
            RequestError: a message or a part is malformed; the error names it.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
            raise RequestError(f"messages is a {type(messages).__name__}; expected a list of messages")
        if not messages:
            raise RequestError("messages is empty; expected at least one message")
        return cls(tuple(_message(f"messages[{index}]", message) for index, message in enumerate(messages)))

    @property
    def media(self) -> list[MediaPart]:
        """All media parts, in order."""
        return [part for message in self.messages for part in message.media]

    @cached_property
    def counts(self) -> Mapping[Modality, int]:
        """Items of each modality."""
        return Counter(part.modality for part in self.media)

    def with_values(self, values: Sequence[Any]) -> Conversation:
        """The same conversation with other values in its media parts, in their order."""
        following, messages = iter(values), []
        for message in self.messages:
            parts = (
                replace(p, value=next(following)) if isinstance(p, MediaPart) else p for p in message.parts
            )
            messages.append(replace(message, parts=tuple(parts)))
        return Conversation(tuple(messages))


def check_limits(counts: Mapping[Modality, int], limits: Mapping[Modality, int]) -> None:
    """Refuse more items than allowed.

    Raises:
        MediaError: there are more; the message names the setting.
    """
    for modality, count in counts.items():
        limit = limits.get(modality)
        if limit is not None and count > limit:
            raise MediaError(
                f"At most {limit} {modality}(s) may be provided in one request. This one has {count}, those "
                f"of earlier messages included; limit_mm_per_prompt={{{modality!r}: {count}}} would allow it "
                f"(opsin serve: --limit-mm-per-prompt {modality}={count})"
            )


def place_of(where: str, value: Any) -> str:
    """A place for messages, with the name of the file or the URL that stands there, if it has one."""
    name = getattr(value, "filename", None) or (value if isinstance(value, (str, PurePath)) else "")
    named = name and not str(name).startswith("data:")
    return f"{where} ({str(name)[:100]!r})" if named else where


def names_function(value: Any) -> bool:
    """Whether a tool or a tool call has the form ``{"function": {"name": ...}}``."""
    function = value.get("function") if isinstance(value, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}; expected a dict with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in get_args(Role):
        raise RequestError(f"{where}.role is {str(role)[:50]!r}; expected one of {', '.join(get_args(Role))}")
    if content is None and role != "assistant":
        raise RequestError(f"{where} has no content; expected text or a list of parts")
    fields = {key: value for key, value in message.items() if key != "content" and value is not None}
    for number, call in enumerate(fields.get("tool_calls", ())):
        if not names_function(call):
            raise RequestError(
                f'{where}.tool_calls[{number}]: expected {{"function": {{"name": ..., "arguments": ...}}}}'
            )
    return Message(fields, _parts(f"{where}.content", content))


def _parts(where: str, content: Any) -> tuple[Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise RequestError(f"{where} is a {type(content).__name__}; expected text or a list of parts")
    return tuple(_part(f"{where}[{index}]", part) for index, part in enumerate(content))


def _part(where: str, part: Any) -> Part:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestError(f"{where} is a {type(part).__name__}; expected a dict with a type")
    require_known(f"{where}.type", [part.get("type")], PART_TYPES, RequestError)
    kind = PART_TYPES[part["type"]]
    where_value, value = f"{where}.{kind.key}", part.get(kind.key)
    if kind.form == "url":
        value = value.get("url") if isinstance(value, Mapping) else None
        if not isinstance(value, str):
            raise RequestError(f'{where_value} must be a dict with a string: {{"url": ...}}')
    elif kind.form == "string" and not isinstance(value, str):
        raise RequestError(f"{where_value} is a {type(value).__name__}; expected a string")
    elif value is None:
        raise RequestError(f"{where} has no {kind.key!r}; expected the {kind.modality} there")
    if kind.modality is None:
        return str(value)
    if name := next((name for name in SIZE_FIELDS if part.get(name) is not None), None):
        raise RequestError(f"{where}.{name}: {NO_SIZE}")
    if kind.modality == "video" and not kind.is_embeds and part.get("fps") is not None:
        value = value, {"fps": part["fps"]}
    return MediaPart(where, kind.modality, value, kind.is_embeds)
