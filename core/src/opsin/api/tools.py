"""Tool calls: how a family writes tools into a prompt and calls into an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class ToolCallPiece:
    """A piece of a call: the name with the first one, the arguments as they come.

    Attributes:
        index: number of the call in the answer, from 0.
        name: of the function, in the call's first piece; None in all others.
        arguments: JSON text.
    """

    index: int
    name: str | None
    arguments: str


@dataclass
class ToolPieces:
    """What a piece of an answer brought.

    Attributes:
        content: text for the user.
        calls: pieces of calls.
    """

    content: str = ""
    calls: list[ToolCallPiece] = field(default_factory=list)


class ToolParser(Protocol):
    """Splits one answer, as it grows, into text and calls.

    Attributes:
        num_calls: calls begun so far.
    """

    num_calls: int

    def push(self, text: str) -> ToolPieces:
        """Take what comes next; returns what is certain by now."""
        ...

    def flush(self) -> ToolPieces:
        """What was held back. Called once, at the end."""
        ...


class ToolFormat(Protocol):
    """The form of tool calls that a family was trained with.

    Attributes:
        system: message to begin a conversation with that has tools and no system message.
    """

    system: str

    def fits(self, template: str) -> bool:
        """Whether tools can be written into the messages of a chat template that does not know of them."""
        ...

    def instructions(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """What follows the system message: the tools (as in OpenAI's API) and how to call them."""
        ...

    def call(self, name: str, arguments: Any) -> str:
        """A call as the assistant writes it; ``arguments`` is JSON data, or text that is no JSON."""
        ...

    def around_result(self) -> tuple[str, str]:
        """What stands before and after a result, in a user's turn."""
        ...

    def grammar(self, tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
        """A grammar in Lark's notation, from ``start``, of answers that are calls of these tools."""
        ...

    def parser(self, max_calls: int | None = None) -> ToolParser:
        """A parser of one answer that drops calls after ``max_calls``; None: there may be any number."""
        ...
