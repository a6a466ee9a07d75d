"""Tools of a chat: those the model is told of, answers that must be calls, calls as OpenAI writes them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from opsin.api import ToolFormat, ToolPieces
from opsin.params import StructuredOutput
from opsin.server.schema.chat import ChatRequest, NamedToolChoice, Tool
from opsin.server.schema.responses import FunctionCall, FunctionCallDelta, ToolCall, ToolCallDelta


def tools_in_use(request: ChatRequest) -> Sequence[Tool]:
    """The tools that the model is told of."""
    return () if request.tool_choice == "none" else request.tools or ()


def call_grammar(request: ChatRequest, form: ToolFormat) -> StructuredOutput | None:
    """What constrains the answer to calls, for ``tool_choice`` required or named; else None."""
    if request.tool_choice == "required":
        tools, several = list(request.tools or ()), request.parallel_tool_calls is not False
    elif isinstance(request.tool_choice, NamedToolChoice):
        name = request.tool_choice.function.name
        tools, several = [tool for tool in request.tools or () if tool.function.name == name], False
    else:
        return None
    plain = [tool.model_dump(exclude_none=True) for tool in tools]
    return StructuredOutput(grammar=form.grammar(plain, several=several))


def max_calls(request: ChatRequest) -> int | None:
    """Most calls that the answer may hold; None: any number."""
    return 1 if request.parallel_tool_calls is False else None


def deltas(pieces: ToolPieces) -> list[ToolCallDelta]:
    """Pieces of calls as a stream sends them: one entry a call, as clients expect of a chunk."""
    made: list[ToolCallDelta] = []
    for piece in pieces.calls:
        if piece.name is not None:
            function = FunctionCallDelta(name=piece.name, arguments=piece.arguments)
            name = f"call_{uuid.uuid4().hex[:24]}"
            made.append(ToolCallDelta(index=piece.index, id=name, type="function", function=function))
        elif made and made[-1].index == piece.index:
            made[-1].function.arguments += piece.arguments
        else:
            function = FunctionCallDelta(arguments=piece.arguments)
            made.append(ToolCallDelta(index=piece.index, function=function))
    return made


def parse_answer(form: ToolFormat, text: str, most: int | None = None) -> tuple[str, list[ToolCall]]:
    """A complete answer -> its text and its calls. Streams use the same parser, so the two agree."""
    parser = form.parser(most)
    both = parser.push(text), parser.flush()
    calls: list[ToolCall] = []
    for delta in (delta for pieces in both for delta in deltas(pieces)):
        name, arguments = delta.function.name, delta.function.arguments
        if delta.id:
            function = FunctionCall(name=name, arguments=arguments)
            calls.append(ToolCall(id=delta.id, type="function", function=function))
        else:
            calls[-1].function.arguments += arguments
    return "".join(pieces.content for pieces in both), calls
