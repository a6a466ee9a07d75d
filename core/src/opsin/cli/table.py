"""Tables: drawn on a terminal, aligned plain text where the output goes into a pipe or a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence


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
