"""Tools in the hermes form of ChatML: into the prompt, onto the tokens, out of the answer.

A call is written as::

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opsin.config import StructuredOutput
from opsin.server.http.errors import bad_request
from opsin.server.schema.chat import ChatRequest, NamedToolChoice, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_MAX_CALLS = 16
"""Calls that an answer constrained to calls may hold: a weak model would never end by itself."""

_DEFAULT_SYSTEM = "You are a helpful assistant."
"""What ChatML templates usually write where a conversation has no system message."""

_INSTRUCTIONS = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""The wording that models of this form are trained on; docs/serving.md names its source (Apache-2.0)."""


def tools_in_use(request: ChatRequest) -> Sequence[Tool]:
    """The tools that the model is told of."""
    return () if request.tool_choice == "none" else request.tools or ()


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], template: str | None
) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as a chat template takes them.

    A template that knows of tools gets them. For a ChatML template that does not, tools, calls and
    results are written into the messages, as a template of that form would write them.

    Args:
        messages: with ``tool_calls`` and ``tool`` messages as OpenAI has them.
        tools: in use.
        template: Jinja text.

    Raises:
        ApiError: the template has no form for tools.
    """
    signatures = [tool.model_dump(exclude_none=True) for tool in tools]
    used = bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if not used:
        return list(messages), None
    if template is not None and "tool" in template:
        return [_with_parsed_arguments(message) for message in messages], signatures or None
    if template is None or "<|im_start|>" not in template:
        raise bad_request("this model's chat template has no tools", "tools")
    return _written_out(messages, signatures), None


def call_grammar(request: ChatRequest) -> StructuredOutput | None:
    """What constrains the answer to calls, for ``tool_choice`` required or named; else None."""
    if request.tool_choice == "required":
        tools = list(request.tools or ())
        several = request.parallel_tool_calls is not False
    elif isinstance(request.tool_choice, NamedToolChoice):
        name = request.tool_choice.function.name
        tools = [tool for tool in request.tools or () if tool.function.name == name]
        several = False
    else:
        return None
    lines = [f'start: call ("\\n" call){{0,{_MAX_CALLS - 1}}}' if several else "start: call"]
    lines.append(f'call: {json.dumps(OPEN)} "\\n" body "\\n" {json.dumps(CLOSE)}')
    lines.append("body: " + " | ".join(f"f{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.function.name)}, "arguments": ')
        schema = {
            **(tool.function.parameters or {"type": "object"}),
            # As the models write it. Free white space would let a weak model write nothing else.
            "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
        }
        lines.append(f'f{number}: {head} a{number} "}}"')
        lines.append(f"a{number}: %json {json.dumps(schema)}")
    return StructuredOutput(grammar="\n".join(lines))


def _with_parsed_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Templates write arguments with ``tojson``: as text they would be quoted twice."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _arguments(call)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _arguments(call: Mapping[str, Any]) -> Any:
    text = call["function"]["arguments"]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _written_out(
    messages: Sequence[Mapping[str, Any]], signatures: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    written: list[dict[str, Any]] = []
    rest = list(messages)
    if signatures:
        first = rest.pop(0) if rest[0]["role"] == "system" else {"role": "system", "content": _DEFAULT_SYSTEM}
        listed = "\n".join(json.dumps(signature, ensure_ascii=False) for signature in signatures)
        parts = [*_parts(first), _text(_INSTRUCTIONS.format(signatures=listed))]
        written.append({**first, "content": _joined(parts)})
    in_results = False
    for message in rest:
        is_result = message["role"] == "tool"
        if is_result:
            parts = [_text("<tool_response>\n"), *_parts(message), _text("\n</tool_response>")]
            if in_results:  # results of parallel calls share one turn
                written[-1]["content"] = _joined([*_parts(written[-1]), _text("\n"), *parts])
            else:
                written.append({"role": "user", "content": _joined(parts)})
        elif message.get("tool_calls"):
            parts = _parts(message)
            for call in message["tool_calls"]:
                body = {"name": call["function"]["name"], "arguments": _arguments(call)}
                line_break = "\n" if parts else ""
                parts.append(_text(f"{line_break}{OPEN}\n{json.dumps(body, ensure_ascii=False)}\n{CLOSE}"))
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            written.append({**kept, "content": _joined(parts)})
        else:
            written.append(dict(message))
        in_results = is_result
    return list(written)


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    if isinstance(content, str):
        return [_text(content)] if content else []
    return list(content or ())


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _joined(parts: Sequence[Any]) -> str | list[Any]:
    """Neighbouring texts become one: templates of the string format would put line breaks between them."""
    joined: list[Any] = []
    for part in parts:
        is_text = part.get("type") in ("text", "input_text")
        if is_text and joined and joined[-1].get("type") in ("text", "input_text"):
            joined[-1] = _text(joined[-1]["text"] + part["text"])
        else:
            joined.append(part)
    return joined[0]["text"] if len(joined) == 1 and "text" in joined[0] else joined
