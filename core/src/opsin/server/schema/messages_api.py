"""The body of ``POST /v1/messages``, Anthropic's, and how it becomes a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from opsin.server.schema.strict import FIRST_FAULT, RequestBody, StrictModel, content_kind


class AnthropicTool(StrictModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None
    strict: bool | None = None


class AnthropicChoice(StrictModel):
    """Whether and what the model calls."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(StrictModel):
    """The form of the answer: a JSON schema."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(StrictModel):
    """How the answer is to be; ``effort`` changes nothing here."""

    effort: str | None = None
    format: OutputFormat | None = None


class _Block(RequestBody):
    ignored: ClassVar[frozenset[str]] = frozenset({"cache_control", "citations", "caller"})
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


class TextBlock(_Block):
    """Text."""

    type: Literal["text"]
    text: str


class Base64Source(StrictModel):
    """A picture's file in base64."""

    type: Literal["base64"]
    media_type: str
    data: str


class UrlSource(StrictModel):
    """Where a picture is."""

    type: Literal["url"]
    url: str


class ImageBlock(_Block):
    """A picture."""

    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]


class ToolUseBlock(_Block):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_Block):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: (
        Annotated[
            Annotated[str, Tag("as_text")]
            | Annotated[
                list[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]],
                FIRST_FAULT,
                Tag("as_parts"),
            ],
            Discriminator(content_kind),
        ]
        | None
    ) = None
    is_error: bool | None = None
    """Accepted; a chat has no place for it, the result says it itself."""


class ThinkingBlock(_Block):
    """What a model thought. Not shown to it again, as chat templates leave earlier thoughts out."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None


class AnthropicMessage(StrictModel):
    """A message: a text, or blocks of text, pictures, calls and results."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("as_text")]
        | Annotated[
            list[
                Annotated[
                    TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock,
                    Field(discriminator="type"),
                ]
            ],
            FIRST_FAULT,
            Tag("as_parts"),
        ],
        Discriminator(content_kind),
    ]


class CountTokensRequest(RequestBody):
    """The body of ``POST /v1/messages/count_tokens``."""

    ignored: ClassVar[frozenset[str]] = RequestBody.ignored | {
        *("thinking", "cache_control", "context_management", "betas", "speed", "diagnostics"),
        *("inference_geo", "user_profile_id", "workspace_id"),
    }
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "container": (),
        "mcp_servers": ([],),
        "output_format": (),
    }

    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=10_000)]
    model: Annotated[str | None, Field(max_length=1024)] = None
    system: (
        Annotated[
            Annotated[str, Tag("as_text")] | Annotated[list[TextBlock], FIRST_FAULT, Tag("as_parts")],
            Discriminator(content_kind),
        ]
        | None
    ) = None
    tools: Annotated[list[AnthropicTool] | None, Field(max_length=256)] = None
    tool_choice: AnthropicChoice | None = None
    output_config: OutputConfig | None = None

    def chat_messages(self) -> list[dict[str, Any]]:
        """The same as messages of a chat."""
        system = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        return [*system, *(part for message in self.messages for part in _chat_messages(message))]

    def chat_tools(self) -> list[dict[str, Any]] | None:
        """The tools as a chat has them."""
        if not self.tools:
            return None
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                },
            }
            for tool in self.tools
        ]


class MessagesRequest(CountTokensRequest):
    """What is asked. ``thinking`` and the like are accepted, and change nothing here."""

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float | None, Field(ge=0, le=1)] = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None

    def chat(self) -> dict[str, Any]:
        """The same as the body of a chat."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self.chat_messages(),
            "max_completion_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences or None,
            "tools": self.chat_tools(),
            "stream": bool(self.stream),
        }
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        form = None if self.output_config is None else self.output_config.format
        if form is not None:
            named = {"name": "answer", "schema": form.schema_}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        choice = self.tool_choice
        if choice is not None:
            function: Any = {"type": "function", "function": {"name": choice.name}}
            words = {"auto": "auto", "any": "required", "none": "none", "tool": function}
            body["tool_choice"] = words[choice.type]
            if choice.disable_parallel_tool_use:
                body["parallel_tool_calls"] = False
        return body


def _chat_messages(message: AnthropicMessage) -> list[dict[str, Any]]:
    """Results of tools are messages of their own in a chat, before what the user says beside them."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            content = block.content or ""
            given = content if isinstance(content, str) else [_part(part) for part in content]
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": given})
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif not isinstance(block, ThinkingBlock):
            parts.append(_part(block))
    said: dict[str, Any] = {"role": message.role, "content": parts or None}
    if calls:
        said["tool_calls"] = calls
    return [*results, *([said] if parts or calls else [])]


def _part(block: TextBlock | ImageBlock) -> dict[str, Any]:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    source = block.source
    url = source.url if isinstance(source, UrlSource) else f"data:{source.media_type};base64,{source.data}"
    return {"type": "image_url", "image_url": {"url": url}}


def _text(system: str | Sequence[TextBlock]) -> str:
    return system if isinstance(system, str) else "\n\n".join(block.text for block in system)
