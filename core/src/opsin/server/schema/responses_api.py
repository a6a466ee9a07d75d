"""The body of ``POST /v1/responses``, and how it becomes a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from opsin.inputs.conversation import Role
from opsin.params import MAX_LOGPROBS
from opsin.server.schema.chat import ImageUrlPart, InputImagePart, TextPart
from opsin.server.schema.sampling import StreamOptions
from opsin.server.schema.strict import FIRST_FAULT, RequestBody, StrictModel, content_kind


class OutputTextPart(RequestBody):
    """What the model said before: text like any other."""

    ignored: ClassVar[frozenset[str]] = frozenset({"annotations", "logprobs"})

    type: Literal["output_text"]
    text: str


class RefusalPart(StrictModel):
    """What the model would not do, in its words."""

    type: Literal["refusal"]
    refusal: str


_Parts = list[
    Annotated[
        TextPart | ImageUrlPart | InputImagePart | OutputTextPart | RefusalPart, Field(discriminator="type")
    ]
]
_Content = Annotated[
    Annotated[str, Tag("as_text")] | Annotated[_Parts, FIRST_FAULT, Tag("as_parts")],
    Discriminator(content_kind),
]


_MOST_FIELDS = 64


class _Item(RequestBody):
    ignored: ClassVar[frozenset[str]] = frozenset({"id", "status", "phase", "namespace", "caller"})
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _is_echoed(cls, data: Any) -> Any:
        """Clients send items of answers back as their library holds them: with its unset fields as null."""
        if not isinstance(data, dict) or len(data) > _MOST_FIELDS:
            return data
        return {name: value for name, value in data.items() if value is not None}


class MessageItem(_Item):
    """A message; the only item that may leave its type out."""

    type: Literal["message"] = "message"
    role: Role
    content: _Content


class CallItem(_Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = "{}"


class ResultItem(_Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: _Content


class ReasoningItem(_Item):
    """What a model thought. Not shown to it again, as chat templates leave earlier thoughts out."""

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None


def _item_kind(value: Any) -> str:
    return str(value.get("type", "message")) if isinstance(value, dict) else str(getattr(value, "type", ""))


_Items = list[
    Annotated[
        Annotated[MessageItem, Tag("message")]
        | Annotated[CallItem, Tag("function_call")]
        | Annotated[ResultItem, Tag("function_call_output")]
        | Annotated[ReasoningItem, Tag("reasoning")],
        Discriminator(_item_kind),
    ]
]


class TextFormat(StrictModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(RequestBody):
    """How the answer's text is to be."""

    ignored: ClassVar[frozenset[str]] = RequestBody.ignored | {"verbosity"}

    format: TextFormat | None = None


class FunctionTool(StrictModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(StrictModel):
    """Calls exactly this function."""

    type: Literal["function"]
    name: str


class ResponsesRequest(RequestBody):
    """What is asked, as items. ``reasoning`` and the like are accepted, and change nothing here."""

    ignored: ClassVar[frozenset[str]] = RequestBody.ignored - {"metadata"} | {
        *("include", "max_tool_calls", "reasoning", "truncation", "context_management", "moderation"),
        *("prompt_cache_options", "background_options", "access_programs"),
    }
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "conversation": (),
        "image": (),
        "prompt": (),
    }

    input: Annotated[
        Annotated[str, Tag("as_text")]
        | Annotated[_Items, FIRST_FAULT, Field(min_length=1, max_length=10_000), Tag("as_parts")],
        Discriminator(content_kind),
    ]
    model: Annotated[str | None, Field(max_length=1024)] = None
    instructions: str | None = None
    previous_response_id: Annotated[str | None, Field(max_length=256)] = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool] | None, Field(max_length=256)] = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = None

    def messages(self) -> list[dict[str, Any]]:
        """The input as messages of a chat, without the instructions."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        messages: list[dict[str, Any]] = []
        for item in self.input:
            if isinstance(item, MessageItem):
                messages.append({"role": item.role, "content": _content(item.content)})
            elif isinstance(item, CallItem):
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                if messages and messages[-1]["role"] == "assistant":
                    messages[-1].setdefault("tool_calls", []).append(call)
                else:
                    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            elif isinstance(item, ResultItem):
                result = {"role": "tool", "tool_call_id": item.call_id}
                messages.append({**result, "content": _content(item.output)})
        return messages

    def chat(self, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The same as the body of a chat.

        Args:
            earlier: messages of the responses before this one.
        """
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *earlier, *self.messages()],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
            "stream": bool(self.stream),
        }
        if self.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.tools:
            body["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
                for tool in self.tools
            ]
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif choice is not None and (choice != "none" or self.tools):
            body["tool_choice"] = choice
        form = None if self.text is None else self.text.format
        if form is not None and form.type == "json_schema":
            named = {"name": form.name or "answer", "schema": form.schema_, "strict": form.strict}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        elif form is not None:
            body["response_format"] = {"type": form.type}
        return body


def _content(content: str | _Parts) -> Any:
    """Parts as a chat has them."""
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, (OutputTextPart, RefusalPart)):
            text = part.text if isinstance(part, OutputTextPart) else part.refusal
            parts.append({"type": "text", "text": text})
        else:
            parts.append(part.model_dump(exclude_none=True))
    return parts
