"""The body of ``POST /v1/responses``, and how it becomes a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from opsin.params import MAX_LOGPROBS
from opsin.server.schema.sampling import StreamOptions
from opsin.server.schema.strict import FIRST_FAULT, RequestBody, StrictModel, field_error

_IGNORED_ITEMS = ("reasoning", "item_reference")


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

    input: str | Annotated[list[dict[str, Any]], FIRST_FAULT, Field(min_length=1, max_length=10_000)]
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
        """The input as messages of a chat, without the instructions.

        Raises:
            PydanticCustomError: an item is of a kind that is not known.
        """
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        messages: list[dict[str, Any]] = []
        for number, item in enumerate(self.input):
            kind = item.get("type", "message")
            if kind == "message":
                messages.append({"role": item.get("role"), "content": _content(item.get("content"))})
            elif kind == "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                if messages and messages[-1]["role"] == "assistant":
                    messages[-1].setdefault("tool_calls", []).append(call)
                else:
                    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            elif kind == "function_call_output":
                result = {"role": "tool", "tool_call_id": item.get("call_id")}
                messages.append({**result, "content": _content(item.get("output"))})
            elif kind not in _IGNORED_ITEMS:
                raise field_error("input", f"input[{number}]: items of type {str(kind)[:40]!r} are not known")
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


def _content(content: Any) -> Any:
    """Parts as a chat has them: what the model said before is text like any other."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("output_text", "refusal"):
            parts.append({"type": "text", "text": part.get("text", part.get("refusal", ""))})
        elif kind == "input_image":
            kept = {name: value for name, value in part.items() if name in ("type", "image_url", "detail")}
            parts.append({name: value for name, value in kept.items() if value is not None})
        else:
            parts.append(part)
    return parts
