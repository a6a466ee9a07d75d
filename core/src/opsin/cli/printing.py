"""What commands print. Help by topic in plain text: in 80 columns rich's tables would cut longer flags off.
Tables: drawn on a terminal, aligned plain text where the output goes into a pipe or a file."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

_INDENT = 34
_WIDEST = 110


class PlainHelp:
    """How cyclopts prints its help."""

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        """Print how the command is called."""
        print(f"Usage: {_plain(console, usage)}", end="\n\n", file=console.file)

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        """Print what the command does."""
        for paragraph in _plain(console, description).split("\n\n"):
            print(textwrap.fill(paragraph, min(console.width, _WIDEST)), end="\n\n", file=console.file)

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print the flags of one topic."""
        rows = [(_label(entry, str(panel.title)), _about(console, entry)) for entry in panel.entries]
        if not rows:
            return
        indent = min(_INDENT, 4 + max(len(label) for label, _ in rows))
        print(f"{panel.title}:", file=console.file)
        for label, about in rows:
            text = textwrap.fill(
                about,
                min(console.width, _WIDEST),
                initial_indent=" " * indent,
                subsequent_indent=" " * indent,
                break_on_hyphens=False,
            )
            line = f"  {label}"
            fits = len(line) + 2 <= indent
            print(line + text[len(line) :] if fits else f"{line}\n{text}", file=console.file)
        print(file=console.file)


def _label(entry: HelpEntry, title: str) -> str:
    names = [*entry.positive_names, *entry.positive_shorts]
    if title == "Arguments":
        return str(getattr(entry, "positional_label", None) or names[0])  # cyclopts 4 has it as a name
    return " ".join(
        filter(None, [", ".join(names), _placeholder(entry), *(f"/ {n}" for n in entry.negative_names)])
    )


def _placeholder(entry: HelpEntry) -> str:
    if entry.choices:
        return f"<{'|'.join(entry.choices)}>"
    types = set(_types(entry.type))
    if entry.type is None or bool in types:
        return ""
    names = ((dict, "NAME=VALUE"), (int, "N"), (float, "N"), (Path, "PATH"))
    return next((name for kind, name in names if kind in types), "TEXT")


def _types(hint: Any) -> Iterator[Any]:
    yield get_origin(hint) or hint
    for member in get_args(hint):
        yield from _types(member)


def _about(console: Console, entry: HelpEntry) -> str:
    shown = {"True": "on", **dict.fromkeys(("False", "()", "{}", None), "")}.get(entry.default, entry.default)
    default = "[required]" if entry.required else f"[default: {shown}]" if shown else ""
    return " ".join(f"{_plain(console, entry.description)} {default}".split())


def _plain(console: Console, text: Any) -> str:
    if hasattr(text, "primary_renderable"):  # what cyclopts makes of plain text
        return str(text.primary_renderable)
    with console.capture() as captured:
        console.print(text, highlight=False)
    return captured.get().strip()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a title; one without rows says so."""
    if sys.stdout.isatty():
        _print_drawn(title, columns, rows)
    else:
        _print_plain(title, columns, rows)


def _print_drawn(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: brackets in a message are not markup
    if rows:
        Console().print(table)
    else:
        Console().print(f"[bold]{title}[/bold]\n  none\n")


def _print_plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"{title}:" if rows else f"{title}: none")
    cells = [tuple(columns), *map(tuple, rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print()
