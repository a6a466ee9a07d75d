"""The figures as bars, in an SVG that reads on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from peers.catalogue import GROUPS, Row

if TYPE_CHECKING:
    from peers.figures import Column
    from peers.table import Report

SHOWN = ("first_token_s", "inter_token_s", "throughput_s", "shared_s")
WIDTH, LABEL, PANEL, BAR, GAP, HEAD = 1180, 190, 235, 15, 4, 58
OURS, THEIRS, INK = "#2563eb", "#9ca3af", "#6b7280"


def svg(report: Report) -> str:
    """A panel for each of the main columns, a bar for each row, one group of rows below the other."""
    from peers.figures import COLUMNS

    columns = [column for column in COLUMNS if column.key in SHOWN]
    groups = [(group, [row for row in report.rows if row.group == group]) for group in GROUPS]
    groups = [(group, rows) for group, rows in groups if rows]
    height = HEAD + sum(26 + len(rows) * (BAR + GAP) for _, rows in groups) + 12
    facts = f"{report.facts['cpu']}, {report.threads} cores; medians, shorter is better"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>opsin and other engines at equal bits: {escape(facts)}</title>",
        _text(8, 20, facts, INK),
    ]
    parts += [_text(LABEL + i * PANEL, 44, column.title, INK, weight=600) for i, column in enumerate(columns)]
    top = HEAD
    for group, rows in groups:
        parts.append(_text(8, top + 14, group, INK, weight=600))
        top += 26
        for row in rows:
            parts.append(_text(LABEL - 10, top + BAR - 3, row.name, INK, anchor="end", weight=_weight(row)))
            parts += _bars(report, row, columns, top)
            top += BAR + GAP
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bars(report: Report, row: Row, columns: Sequence[Column], top: int) -> list[str]:
    parts = []
    figures = report.figures(row)
    for i, column in enumerate(columns):
        left = LABEL + i * PANEL
        found = figures.get(column.key)
        if found is None:
            parts.append(_text(left, top + BAR - 3, "–", INK))
            continue
        longest = max(
            report.figures(other)[column.key].median for other in report.rows if _has(report, other, column)
        )
        width = max(1.0, (PANEL - 60) * found.median / longest)
        colour = OURS if row.peer == "opsin" else THEIRS
        parts.append(
            f'<rect x="{left}" y="{top}" width="{width:.1f}" height="{BAR}" rx="2" fill="{colour}"/>'
        )
        floor = report.floors(row).get(column.key)
        if floor is not None:
            x = left + (PANEL - 60) * floor / longest
            parts.append(f'<path d="M{x:.1f} {top - 1}v{BAR + 2}" stroke="#dc2626" stroke-width="1.5"/>')
        number = f"{found.median * column.scale:.{column.digits}f}"
        parts.append(_text(left + width + 5, top + BAR - 3, number, INK, weight=_weight(row)))
    return parts


def _has(report: Report, row: Row, column: Column) -> bool:
    return column.key in report.figures(row)


def _weight(row: Row) -> int:
    return 600 if row.peer == "opsin" else 400


def _text(x: float, y: float, text: str, colour: str, *, anchor: str = "start", weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
