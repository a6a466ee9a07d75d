"""The hermes form of tool calls, in ChatML turns. A family that was trained with it names `HermesTools`.

A call is written as::

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from opsin.api.tools import ToolCallPiece, ToolPieces

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_MAX_CALLS = 16
"""Calls that an answer constrained to calls may hold: a weak model would never end by itself."""

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

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""Up to the brace that begins the arguments: from here on they are passed on as they come."""


class HermesTools:
    """See `opsin.api.ToolFormat`."""

    system = "You are a helpful assistant."

    def fits(self, template: str) -> bool:
        """Whether the template writes ChatML turns."""
        return "<|im_start|>" in template

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """The tools, one per line, between tags."""
        return _INSTRUCTIONS.format(signatures="\n".join(json.dumps(t, ensure_ascii=False) for t in tools))

    def call(self, name: str, arguments: Any) -> str:
        """See the module."""
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"{OPEN}\n{body}\n{CLOSE}"

    def around_result(self) -> tuple[str, str]:
        """Tags, each on a line of its own."""
        return "<tool_response>\n", "\n</tool_response>"

    def grammar(self, tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        """Calls, each with the arguments of its function's schema."""
        lines = [f'start: call ("\\n" call){{0,{_MAX_CALLS - 1}}}' if several else "start: call"]
        lines.append(f'call: {json.dumps(OPEN)} "\\n" body "\\n" {json.dumps(CLOSE)}')
        lines.append("body: " + " | ".join(f"f{number}" for number in range(len(tools))))
        for number, tool in enumerate(tools):
            function = tool["function"]
            head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
            schema = {
                **(function.get("parameters") or {"type": "object"}),
                # As the models write it. Free white space would let a weak model write nothing else.
                "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
            }
            lines += [f'f{number}: {head} a{number} "}}"', f"a{number}: %json {json.dumps(schema)}"]
        return "\n".join(lines)

    def parser(self, max_calls: int | None = None) -> HermesParser:
        """See `HermesParser`."""
        return HermesParser(max_calls)


class HermesParser:
    """Splits an answer into text and tool calls.

    What turns out to be no call (no JSON, no name) is text. White space around calls is dropped.

    Args:
        max_calls: calls after that many are dropped; None: there may be any number.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self._max_calls = max_calls
        self._pending = ""
        self._step = self._in_text
        self._behind_call = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str) -> ToolPieces:
        """Take what comes next; returns what is certain by now."""
        self._pending += text
        pieces = ToolPieces()
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> ToolPieces:
        """What was held back. Call it once, at the end."""
        pieces = ToolPieces()
        if self._step == self._in_text:
            self._add_text(pieces, self._pending)
        elif self._step == self._before_arguments and not self._whole_call(pieces, self._pending):
            self._add_text(pieces, OPEN + self._pending)
        self._pending = ""
        return pieces

    # ---- one step of each state; False: more text is needed -------------------------------------

    def _in_text(self, pieces: ToolPieces) -> bool:
        start = self._pending.find(OPEN)
        if start >= 0:
            self._add_text(pieces, self._pending[:start].rstrip())
            self._pending = self._pending[start + len(OPEN) :]
            self._step = self._before_arguments
            return True
        # White space may stand before a call, and what looks like a tag's beginning may become one.
        end = len(self._pending) - _num_begun(self._pending, OPEN)
        end = len(self._pending[:end].rstrip())
        self._add_text(pieces, self._pending[:end])
        self._pending = self._pending[end:]
        return False

    def _before_arguments(self, pieces: ToolPieces) -> bool:
        head = _HEAD.match(self._pending)
        if head is not None:
            self._pending = self._pending[head.end() :]
            self._begin(pieces, head[1], "")
            self._depth, self._in_string, self._escaped = 0, False, False
            self._step = self._in_arguments
            return True
        end = self._pending.find(CLOSE)
        if end < 0:
            return False
        body, self._pending = self._pending[:end], self._pending[end + len(CLOSE) :]
        if not self._whole_call(pieces, body):
            self._add_text(pieces, OPEN + body + CLOSE)
        self._step = self._in_text
        return True

    def _in_arguments(self, pieces: ToolPieces) -> bool:
        end, ended = 0, False
        for character in self._pending:
            if not self._in_string and character == "<":  # never in JSON: the call ends unfinished
                ended = True
                break
            end += 1
            self._follow(character)
            if self._depth == 0 and not self._in_string:
                ended = True
                break
        self._continue(pieces, self._pending[:end])
        self._pending = self._pending[end:]
        if ended:
            self._step = self._after_arguments
        return ended

    def _after_arguments(self, pieces: ToolPieces) -> bool:  # noqa: ARG002 (as all steps)
        end = self._pending.find(CLOSE)
        if end < 0:
            return False
        self._pending = self._pending[end + len(CLOSE) :]
        self._step = self._in_text
        return True

    # ---- details ------------------------------------------------------------------------------

    def _follow(self, character: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1

    def _add_text(self, pieces: ToolPieces, text: str) -> None:
        if self._behind_call:
            text = text.lstrip()
        if text:
            self._behind_call = False
            pieces.content += text

    def _whole_call(self, pieces: ToolPieces, body: str) -> bool:
        """Take a call in another order of keys, without arguments, or with arguments as text."""
        try:
            call: Any = json.loads(body)
        except ValueError:
            return False
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return False
        arguments = call.get("arguments", call.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self._begin(pieces, call["name"], text)
        return True

    def _begin(self, pieces: ToolPieces, name: str, arguments: str) -> None:
        self.num_calls += 1
        self._behind_call = True
        if not self._is_dropped():
            pieces.calls.append(ToolCallPiece(self.num_calls - 1, name, arguments))

    def _continue(self, pieces: ToolPieces, arguments: str) -> None:
        if arguments and not self._is_dropped():
            pieces.calls.append(ToolCallPiece(self.num_calls - 1, None, arguments))

    def _is_dropped(self) -> bool:
        return self._max_calls is not None and self.num_calls > self._max_calls


def _num_begun(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    return next(
        (size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0
    )
