"""Runs a page of the documentation, block by block.

``python`` blocks share one namespace. A ``console`` block starts a server, which serves until the next one. A
``text`` block is what the block before it prints.

    python -m tests.docs.page docs/using-vlms.md      # writes what is printed into the page
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.server.process import serve

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ADDRESS = "http://localhost:8000"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its content, and where that begins and ends in the page."""

    kind: str
    text: str
    span: tuple[int, int]


def blocks(page: str) -> list[Block]:
    """All of a page."""
    return [Block(found[1], found[2], found.span(2)) for found in _FENCE.finditer(page)]


def run(page: str) -> Iterator[tuple[Block, str]]:
    """Each ``text`` block, with what the block before it has printed."""
    space: dict[str, Any] = {"__name__": "page"}
    printed, url = "", _ADDRESS
    with ExitStack() as stack:
        for block in blocks(page):
            if block.kind == "console":
                stack.close()
                program, verb, model, *flags = shlex.split(block.text)
                assert (program, verb) == ("opsin", "serve"), block.text
                folder = stack.enter_context(TemporaryDirectory())
                url = stack.enter_context(serve(model, *flags, log=Path(folder) / "log")).url
            elif block.kind == "python":
                out = io.StringIO()
                code = compile(block.text.replace(_ADDRESS, url), "page", "exec")
                with redirect_stdout(out):
                    exec(code, space)
                printed = out.getvalue()
            elif block.kind == "text":
                yield block, printed


def main() -> None:
    """Write what is printed into a page."""
    path = Path(sys.argv[1])
    page = path.read_text()
    for block, printed in reversed(list(run(page))):
        page = page[: block.span[0]] + printed + page[block.span[1] :]
    path.write_text(page)


if __name__ == "__main__":
    main()
