"""OpenAI-style messages -> a prompt: text with placeholders, and the media that go into them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsin.api import Modality, Placeholder
from opsin.checkpoint.tokenizer import ChatTokenizer
from opsin.config import MediaLimits
from opsin.errors import ConfigError, RequestError
from opsin.inputs.conversation import MediaPart, Part, parse_content
from opsin.inputs.media import Fetch
from opsin.inputs.placeholders import is_numbered, text_pattern
from opsin.inputs.processor import check_limits
from opsin.inputs.template import ChatTemplate, ContentFormat

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class _Message:
    fields: Mapping[str, Any]
    parts: Sequence[Part]

    @property
    def media(self) -> list[MediaPart]:
        return [part for part in self.parts if isinstance(part, MediaPart)]

    @property
    def text(self) -> str:
        return "\n".join(part for part in self.parts if isinstance(part, str))


class ChatRenderer:
    """Renders conversations for one model. Thread-safe.

    Users write no placeholders. With an ``openai`` template the template writes them; with a ``string``
    template they are written here, where the media stand among the text. A placeholder that the user did
    write is kept and not doubled; items are numbered across all messages.
    """

    def __init__(
        self,
        *,
        tokenizer: ChatTokenizer,
        chat_template: str | None,
        placeholders: Mapping[Modality, Placeholder],
        content_format: ContentFormat | None = None,
        limits: Mapping[Modality, int] | None = None,
        media_limits: MediaLimits | None = None,
        local_files: bool = False,
    ) -> None:
        """Set up for one model.

        Args:
            tokenizer: renders the template.
            chat_template: Jinja text, see `opsin.chat_template.resolve_chat_template`; None: every chat is
                refused with a message that says what to pass.
            placeholders: of the model, by modality.
            content_format: what the template wants as content; None: found out from the template.
            limits: most items of each modality, checked before anything is decoded.
            media_limits: caps on the size of one item.
            local_files: whether parts may name files of this machine. Only for trusted callers.

        Raises:
            ConfigError: the template is not valid Jinja.
        """
        self._tokenizer = tokenizer
        self._template = chat_template and ChatTemplate(chat_template, tokenizer, content_format)
        self._placeholders = placeholders
        self._limits = limits or {}
        self._media_limits = media_limits or MediaLimits()
        self._local_files = local_files

    @property
    def chat_template(self) -> str | None:
        """The Jinja text in use, None if there is none."""
        return self._template.source if self._template else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        fetch: Fetch | None = None,
    ) -> dict[str, Any]:
        """One conversation -> ``{"prompt": text, "multi_modal_data": {modality: [item, ...]}}``.

        Args:
            messages: ``{"role": ..., "content": text or list of parts}``; parts as in `opsin.chat_parts`.
            add_generation_prompt: end with the assistant's header.
            continue_final_message: leave the last message open, for the model to go on with.
            tools: JSON schemas of functions, for templates that show them.
            chat_template_kwargs: further variables of the template.
            chat_template: Jinja text used instead, for this conversation.
            fetch: fetches http(s) URLs; None: they are refused.

        Raises:
            RequestError: a message or part is malformed; the error names it.
            MediaError: a media part cannot be used, or there are too many.
        """
        template = self._template if chat_template is None else self._own_template(chat_template)
        if not template:
            raise RequestError(
                "this model has no chat template; pass chat_template (opsin serve: --chat-template), "
                "or use a plain prompt instead of messages"
            )
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message leaves the last message open and add_generation_prompt begins a new "
                "one; set only one of them"
            )
        parsed = [_parse_message(index, message) for index, message in enumerate(_listed(messages))]
        media = [part for message in parsed for part in message.media]
        counts: dict[Modality, int] = defaultdict(int)
        for part in media:
            counts[part.modality] += 1
        self._check_modalities(media)
        check_limits(counts, self._limits)

        text = template.render(
            self._for_template(parsed, template),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=chat_template_kwargs or {},
        )
        items: dict[Modality, list[Any]] = defaultdict(list)
        for part in media:
            items[part.modality].append(part.load(self._media_limits, fetch, self._local_files))
        return {"prompt": text, "multi_modal_data": dict(items)}

    def _own_template(self, source: str) -> ChatTemplate:
        try:
            return ChatTemplate(source, self._tokenizer)
        except ConfigError as error:
            raise RequestError(str(error)) from None

    def _check_modalities(self, media: Sequence[MediaPart]) -> None:
        for part in media:
            if part.modality not in self._placeholders:
                takes = ", ".join(sorted(self._placeholders)) or "text only"
                raise RequestError(
                    f"{part.where}: this model does not take {part.modality} (it takes {takes})"
                )

    def _for_template(self, messages: Sequence[_Message], template: ChatTemplate) -> list[dict[str, Any]]:
        """The messages with content as the template wants it: parts without their data, or text."""
        done: dict[Modality, int] = defaultdict(int)
        prepared = []
        for message in messages:
            written = self._already_written(message, done)
            parts: list[Part] = []
            for part in message.parts:
                if isinstance(part, str):
                    parts.append(part)
                    continue
                done[part.modality] += 1
                if (part.modality, done[part.modality]) not in written:
                    number = done[part.modality]
                    as_text = template.traits.format == "string"
                    parts.append(self._placeholders[part.modality].text(number) if as_text else part)
            prepared.append({**message.fields, **_content(message, parts, template)})
        return prepared

    def _already_written(self, message: _Message, done: Mapping[Modality, int]) -> set[tuple[Modality, int]]:
        """Items of a message whose placeholder the user wrote into its text.

        Raises:
            RequestError: the text has some but not all of a message's placeholders, or others: it would be
                a guess which item stands where.
        """
        written: set[tuple[Modality, int]] = set()
        for modality, placeholder in self._placeholders.items():
            found = re.findall(text_pattern(placeholder), message.text)
            if not found:
                continue
            count = sum(part.modality == modality for part in message.media)
            numbers = range(done.get(modality, 0) + 1, done.get(modality, 0) + count + 1)
            own = {placeholder.text(number): number for number in numbers}
            if is_numbered(placeholder):
                fits = len(set(found)) == len(found) and set(found) <= set(own)
                mine = [own[text] for text in found if text in own]
            else:
                fits, mine = len(found) == count, list(numbers)
            if not fits:
                raise RequestError(
                    f"a message with {count} {modality} part(s) has {len(found)} placeholder(s) {found[0]!r} "
                    "in its text; write none (they are added where the parts stand), or each exactly once"
                )
            written |= {(modality, number) for number in mine}
        return written


def _listed(messages: Any) -> Sequence[Any]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise RequestError(f"messages is a {type(messages).__name__}; expected a list of messages")
    if not messages:
        raise RequestError("messages is empty; expected at least one message")
    return messages


def _parse_message(index: int, message: Any) -> _Message:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}; expected a dict with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role is {str(role)[:50]!r}; expected one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role != "assistant":
        raise RequestError(f"{where} has no content; expected text or a list of parts")
    fields = {key: value for key, value in message.items() if key != "content" and value is not None}
    return _Message(fields, parse_content(f"{where}.content", content))


def _content(message: _Message, parts: Sequence[Part], template: ChatTemplate) -> dict[str, Any]:
    if not message.parts:
        return {}
    texts = [part for part in parts if isinstance(part, str)]
    if template.traits.format == "string":
        return {"content": "\n".join(texts)}
    if template.traits.takes_strings and len(texts) == len(parts) == 1:
        return {"content": texts[0]}
    return {
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": part.modality}
            for part in parts
        ]
    }
