"""Tool calls out of growing text, piece by piece.

Whole answers go through it, too, so that streamed answers are those that are not.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from opsin.server.schema.responses import FunctionCall, FunctionCallDelta, ToolCall, ToolCallDelta
from opsin.server.tools import CLOSE, OPEN

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""Up to the brace that begins the arguments: from here on they are passed on as they come."""


@dataclass
class Pieces:
    """What a piece of text brought.

    Attributes:
        content: text for the user.
        calls: pieces of calls.
    """

    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)


class ToolParser:
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

    def push(self, text: str) -> Pieces:
        """Take what comes next; returns what is certain by now."""
        self._pending += text
        pieces = Pieces()
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> Pieces:
        """What was held back. Call it once, at the end."""
        pieces = Pieces()
        if self._step == self._in_text:
            self._add_text(pieces, self._pending)
        elif self._step == self._before_arguments and not self._whole_call(pieces, self._pending):
            self._add_text(pieces, OPEN + self._pending)
        self._pending = ""
        return pieces

    # ---- one step of each state; False: more text is needed -------------------------------------

    def _in_text(self, pieces: Pieces) -> bool:
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

    def _before_arguments(self, pieces: Pieces) -> bool:
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

    def _in_arguments(self, pieces: Pieces) -> bool:
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

    def _after_arguments(self, pieces: Pieces) -> bool:
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

    def _add_text(self, pieces: Pieces, text: str) -> None:
        if self._behind_call:
            text = text.lstrip()
        if text:
            self._behind_call = False
            pieces.content += text

    def _whole_call(self, pieces: Pieces, body: str) -> bool:
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

    def _begin(self, pieces: Pieces, name: str, arguments: str) -> None:
        self.num_calls += 1
        self._behind_call = True
        if not self._is_dropped():
            pieces.calls.append(
                ToolCallDelta(
                    index=self.num_calls - 1,
                    id=f"call_{uuid.uuid4().hex[:24]}",
                    type="function",
                    function=FunctionCallDelta(name=name, arguments=arguments),
                )
            )

    def _continue(self, pieces: Pieces, arguments: str) -> None:
        if arguments and not self._is_dropped():
            pieces.calls.append(
                ToolCallDelta(
                    index=self.num_calls - 1,
                    function=FunctionCallDelta(arguments=arguments),
                )
            )

    def _is_dropped(self) -> bool:
        return self._max_calls is not None and self.num_calls > self._max_calls


def parse_answer(text: str, max_calls: int | None = None) -> tuple[str, list[ToolCall]]:
    """A whole answer -> its text and its calls."""
    parser = ToolParser(max_calls)
    content = ""
    calls: list[ToolCall] = []
    for pieces in (parser.push(text), parser.flush()):
        content += pieces.content
        for delta in pieces.calls:
            if delta.id:
                calls.append(
                    ToolCall(
                        id=delta.id,
                        type="function",
                        function=FunctionCall(name=delta.function.name, arguments=delta.function.arguments),
                    )
                )
            else:
                calls[-1].function.arguments += delta.function.arguments
    return content, calls


def _num_begun(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    return next(
        (size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0
    )
