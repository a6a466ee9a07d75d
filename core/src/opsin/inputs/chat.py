"""A conversation -> a prompt: text with placeholders, and the media that go into them."""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opsin.api import Modality, Placeholder, ToolFormat
from opsin.checkpoint.tokenizer import ChatTokenizer
from opsin.config import MediaLimits
from opsin.errors import ConfigError, MediaError, RequestError
from opsin.inputs.conversation import (
    Conversation,
    MediaPart,
    Message,
    Part,
    check_limits,
    names_function,
    place_of,
)
from opsin.inputs.media import errors_at, open_media
from opsin.inputs.placeholders import GuardedText, UserText, is_numbered, new_guard, text_pattern
from opsin.inputs.prompt import Prompt
from opsin.inputs.template import ChatTemplate

logger = logging.getLogger(__name__)

Tool = Mapping[str, Any]
"""A tool as in OpenAI's API: ``{"type": "function", "function": {"name": ..., "parameters": schema}}``."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a conversation becomes a prompt.

    Attributes:
        add_generation_prompt: end with the assistant's header; None: unless ``continue_final_message``.
        continue_final_message: leave the last message open, for the model to go on with.
        tools: that the model may call, as in OpenAI's API.
        chat_template: Jinja text to use instead of the model's.
        chat_template_kwargs: further variables of the template.
        mm_processor_kwargs: options of the family's input mapper.
        cache_salt: keeps the prompt's cached prefix apart from that of other salts.
        allow_special_tokens: take special tokens and placeholders in messages, tools and template variables
            as such. Only for texts that no one else has written.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tools: Sequence[Tool] | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None
    cache_salt: str | None = None
    allow_special_tokens: bool = False

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message leaves the last message open and add_generation_prompt begins a new "
                "one; set only one of them"
            )
        for tool in self.tools or ():
            if not names_function(tool):
                raise RequestError(
                    f'tools: got {tool!r:.80}; expected {{"type": "function", "function": {{"name": ...}}}}'
                )

    @property
    def begins_answer(self) -> bool:
        """Whether the prompt ends with the assistant's header."""
        begin = self.add_generation_prompt
        return not self.continue_final_message if begin is None else begin


@dataclass(kw_only=True, eq=False)
class ChatRenderer:
    """Renders conversations for one model. Thread-safe.

    Users write no placeholders: what looks like one in their words is text, as a special token is. An
    ``openai`` template writes them; for a ``string`` template they are written here, in place of the media
    parts, as they are for a modality that an ``openai`` template passes over (older ones know no videos).
    Items are numbered across all messages. With `ChatOptions.allow_special_tokens`, a placeholder in a
    message's text is one, and not doubled.

    Attributes:
        tokenizer: renders templates that come with a request.
        template: the model's; None: a chat without one of its own is refused.
        tool_template: the model's for requests with tools, if it has one of its own for them.
        placeholders: placeholder of each modality that the model takes.
        tool_format: form of tool calls; None: tools need a template that knows them.
        limits: most items of each modality.
        media_limits: caps on the size of one item.
        local_files: whether parts may name files of this machine. Only for trusted callers.
    """

    tokenizer: ChatTokenizer
    template: ChatTemplate | None
    tool_template: ChatTemplate | None = None
    placeholders: Mapping[Modality, Placeholder]
    tool_format: ToolFormat | None = None
    limits: Mapping[Modality, int] = field(default_factory=dict)
    media_limits: MediaLimits = field(default_factory=MediaLimits)
    local_files: bool = False

    def __post_init__(self) -> None:
        self._user_text = UserText(self.tokenizer, self.placeholders)
        self._warned = False

    def check(self, conversation: Conversation) -> None:
        """Refuse media that the model does not take, before anything is fetched or decoded.

        Raises:
            RequestError: the model does not take a modality.
            MediaError: there are more items than allowed.
        """
        for part in conversation.media:
            if part.modality not in self.placeholders:
                takes = ", ".join(sorted(self.placeholders)) or "text only"
                raise RequestError(
                    f"{part.where}: this model does not take {part.modality} (it takes {takes})"
                )
        check_limits(conversation.counts, self.limits)

    def render(self, conversation: Conversation, options: ChatOptions) -> Prompt:
        """A conversation that has passed `check` -> its prompt, media opened.

        Raises:
            RequestError: the template refuses the messages, or placeholders that are allowed in the text do
                not fit the media.
            MediaError: a media part cannot be used.
        """
        if options.chat_template is not None:
            template: ChatTemplate | None = self._own(options.chat_template)
        else:
            template = self.tool_template if options.tools and self.tool_template else self.template
        if template is None:
            raise RequestError(
                "this model has no chat template; pass chat_template (opsin serve: --chat-template), "
                "or use a plain prompt instead of messages"
            )
        guard = "" if options.allow_special_tokens else new_guard()
        parsed = [self._guarded(_with_parsed_arguments(message), guard) for message in conversation.messages]
        messages, tools = self._with_tools(
            parsed, self._user_text.guarded_json(options.tools or [], guard), template
        )
        try:
            rendered = template.render(
                self._for_template(messages, template, options),
                add_generation_prompt=options.begins_answer,
                continue_final_message=options.continue_final_message,
                tools=tools,
                variables=self._user_text.guarded_json(options.chat_template_kwargs or {}, guard),
            )
        except RequestError as error:  # whose text may quote a message
            raise RequestError(str(error).replace(guard, "")) from None
        text = GuardedText(rendered, guard)
        items: dict[Modality, list[Any]] = defaultdict(list)
        for part in conversation.media:
            items[part.modality].append(self._load(part))
        salt = options.cache_salt or ""
        return Prompt(
            text=text.plain,
            guarded=text if guard and guard in rendered else None,
            media=items,
            options=options.mm_processor_kwargs or {},
            salt=salt,
        )

    def _guarded(self, message: Message, guard: str) -> Message:
        names = [text_pattern(self.placeholders[part.modality]) for part in message.media]
        if guard and names and not self._warned and (found := re.search("|".join(names), message.text)):
            self._warned = True
            logger.warning(
                "a message with media has %r in its text, where it is text (this is said once); with "
                "allow_special_tokens=True it is the place of an item",
                found[0],
            )
        fields = {key: self._user_text.guarded_json(message.fields[key], guard) for key in message.fields}
        texts = iter(self._user_text.guarded([p for p in message.parts if isinstance(p, str)], guard))
        parts = tuple(next(texts) if isinstance(part, str) else part for part in message.parts)
        return Message(fields, parts)

    def _own(self, source: str) -> ChatTemplate:
        try:
            return ChatTemplate(source, self.tokenizer)
        except ConfigError as error:
            raise RequestError(str(error)) from None

    def _load(self, part: MediaPart) -> Any:
        """A `MediaSource`, or embeddings as they were given: only the model's mapper knows their layout."""
        if part.is_embeds:
            # The processor would take text or bytes for a file's name or content.
            if isinstance(part.value, (str, bytes, bytearray, Path)):
                raise MediaError(
                    f"{part.where}: got embeddings as a {type(part.value).__name__}; expected tensors"
                )
            return part.value
        where = place_of(part.where, part.value) if self.local_files else part.where
        with errors_at(where):
            opened = open_media(part.modality, part.value, self.media_limits, local_files=self.local_files)
        return replace(opened, where=where)

    # ---- tools --------------------------------------------------------------------------------

    def _with_tools(
        self, messages: Sequence[Message], tools: Sequence[Tool], template: ChatTemplate
    ) -> tuple[Sequence[Message], Sequence[Tool] | None]:
        """Messages and tools as the template takes them.

        A template that knows of tools gets them. For one that does not, tools, calls and results become text
        of the messages, in the family's form.
        """
        used = any(message.role == "tool" or message.fields.get("tool_calls") for message in messages)
        if not tools and not used:
            return messages, None
        if "tool" in template.source:
            return messages, tools or None
        form = self.tool_format
        if form is None or not form.fits(template.source):
            raise RequestError(
                "this model's chat template has no tools; pass one that has (chat_template), or leave out "
                "tools and tool messages"
            )
        return _written_out(messages, tools, form), None

    # ---- content ------------------------------------------------------------------------------

    def _for_template(
        self, messages: Sequence[Message], template: ChatTemplate, options: ChatOptions
    ) -> list[dict[str, Any]]:
        """The messages with content as the template wants it: parts without their data, or text."""
        done: dict[Modality, int] = defaultdict(int)
        prepared = []
        for message in messages:
            written = self._already_written(message, done) if options.allow_special_tokens else set()
            parts: list[Part] = []
            for part in message.parts:
                if isinstance(part, str):
                    parts.append(part)
                    continue
                done[part.modality] += 1
                number = done[part.modality]
                if (part.modality, number) not in written:
                    as_text = template.format == "string" or self._is_passed_over(part.modality, template)
                    parts.append(self.placeholders[part.modality].text(number) if as_text else part)
            prepared.append({**message.fields, **_content(message, parts, template)})
        return prepared

    def _is_passed_over(self, modality: Modality, template: ChatTemplate) -> bool:
        """Whether a template that loops over parts names other modalities of the model, and not this one."""
        return modality not in template.source and any(name in template.source for name in self.placeholders)

    def _already_written(self, message: Message, done: Mapping[Modality, int]) -> set[tuple[Modality, int]]:
        """Items of a message whose placeholder the user wrote into its text.

        Raises:
            RequestError: the placeholders in the text do not say which item stands where.
        """
        written: set[tuple[Modality, int]] = set()
        for modality, placeholder in self.placeholders.items():
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


def _content(message: Message, parts: Sequence[Part], template: ChatTemplate) -> dict[str, Any]:
    parts = parts if message.parts else [""]  # as OpenAI's clients store an answer without text
    texts = [part for part in parts if isinstance(part, str)]
    if template.format == "string":
        return {"content": "\n".join(texts)}
    if template.takes_strings and len(texts) == len(parts) == 1:
        return {"content": texts[0]}
    return {
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": part.modality}
            for part in parts
        ]
    }


def _with_parsed_arguments(message: Message) -> Message:
    """Parse arguments given as text, which a template's ``tojson`` would quote again."""
    if not message.fields.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _arguments(call)}}
        for call in message.fields["tool_calls"]
    ]
    return replace(message, fields={**message.fields, "tool_calls": calls})


def _arguments(call: Mapping[str, Any]) -> Any:
    given = call["function"].get("arguments", "{}")
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def _written_out(messages: Sequence[Message], tools: Sequence[Tool], form: ToolFormat) -> list[Message]:
    """Tools, calls and results as text of the messages."""
    written: list[Message] = []
    rest = list(messages)
    if tools:
        system = rest.pop(0) if rest[0].role == "system" else Message({"role": "system"}, (form.system,))
        written.append(_with_parts(system, *system.parts, form.instructions(tools)))
    in_results = False
    for message in rest:
        is_result = message.role == "tool"
        if is_result:
            before, after = form.around_result()
            parts = (before, *message.parts, after)
            if in_results:  # results of parallel calls share one turn
                written[-1] = _with_parts(written[-1], *written[-1].parts, "\n", *parts)
            else:
                written.append(_with_parts(Message({"role": "user"}, ()), *parts))
        elif message.fields.get("tool_calls"):
            calls = [
                form.call(call["function"]["name"], _arguments(call)) for call in message.fields["tool_calls"]
            ]
            said = [part for part in message.parts if part]
            fields = {key: value for key, value in message.fields.items() if key != "tool_calls"}
            written.append(_with_parts(Message(fields, ()), *said, "\n" * bool(said) + "\n".join(calls)))
        else:
            written.append(message)
        in_results = is_result
    return written


def _with_parts(message: Message, *parts: Part) -> Message:
    """The message with these parts. Neighbouring texts are joined, so that no line break parts them."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return replace(message, parts=tuple(joined))
