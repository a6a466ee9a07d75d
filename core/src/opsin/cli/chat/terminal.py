"""Where a conversation's lines come from, and where its answers go."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer

_PATHS = ("/image ", "/video ", "/save ")
"""Commands behind which files are completed."""


def printable(text: str) -> str:
    """Text without characters that would steer a terminal: a model's words must not move its cursor."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "�" for c in text)


def typed(commands: Sequence[str]) -> Iterator[str]:
    """Lines typed at a terminal, with a history over conversations and completion of commands and files.

    Ctrl-C empties a line; Ctrl-D ends. Without a terminal: the lines of standard input.
    """
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    path = history_file()
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if path is None else FileHistory(str(path)),
        completer=completer(commands),
        complete_while_typing=False,
        key_bindings=keys,
    )
    prompt = FormattedText([("" if os.environ.get("NO_COLOR") else "bold ansigreen", "> ")])
    while True:
        try:
            yield session.prompt(prompt, prompt_continuation="  ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def history_file() -> Path | None:
    """Where typed lines are kept, readable by their user alone; None where that cannot be."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(base).expanduser() / "opsin/chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)
    except OSError:
        return None
    return path


def completer(commands: Sequence[str]) -> Completer:
    """Completes commands at the beginning of a line, and files behind those that take one."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Words(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            if text.startswith(_PATHS):
                yield from paths.get_completions(Document(text.rpartition(" ")[2]), complete_event)
            elif text.startswith("/") and " " not in text:
                yield from (Completion(f"{name} ", -len(text)) for name in commands if name.startswith(text))

    return Words()
