"""Results to Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workloads import IMAGE_SIDE, TEXT_TOKENS, Workload, image_tokens

from peers.catalogue import FLOAT, GROUPS, Row
from peers.chart import svg
from peers.figures import COLUMNS, Column, Figure, agreement, figure
from peers.machine import Machine
from peers.turns import CLEAN, Turn

AGREEMENT_WITH = "transformers float32"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything there is to tell.

    Attributes:
        rows: that ran, in the catalogue's order.
        turns: of all of them.
        refused: row or peer -> why it is not in the table.
        machine: best rates; None if they were not measured.
        facts: of the machine, as `report.machine` gives them.
        workloads: as they ran.
        threads: of every engine.
        quick: whether the workloads are too small to mean anything.
    """

    rows: Sequence[Row]
    turns: Sequence[Turn]
    refused: Mapping[str, str]
    machine: Machine | None
    facts: Mapping[str, Any]
    workloads: Sequence[Workload]
    threads: int
    quick: bool

    def of(self, row: Row) -> list[Turn]:
        """A row's turns."""
        return [turn for turn in self.turns if turn.row == row.name]

    def figures(self, row: Row) -> dict[str, Figure]:
        """A row's figures by the column's key."""
        found = {column.key: figure(column, self.of(row)) for column in COLUMNS}
        return {key: value for key, value in found.items() if value is not None}

    def floors(self, row: Row) -> dict[str, float]:
        """Least values of a row's columns, as far as they are known."""
        if self.machine is None:
            return {}
        turns = self.of(row)
        computes_in = turns[-1].about["computes in"] if turns else ""
        found: dict[str, float | None] = {
            "first_token_s": self.machine.first_token_s(row, computes_in),
            "inter_token_s": self.machine.token_s(row),
        }
        for workload in self.workloads:
            if workload.name == "throughput":
                found["throughput_s"] = self.machine.batch_s(row, workload, computes_in)
        return {key: value for key, value in found.items() if value is not None}


def write(report: Report, folder: Path) -> str:
    """Write peers.md, peers.json and peers.svg into ``folder``; the Markdown is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(report)
    (folder / "peers.md").write_text(text, encoding="utf-8")
    (folder / "peers.json").write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
    (folder / "peers.svg").write_text(svg(report), encoding="utf-8")
    return text


def as_json(report: Report) -> dict[str, Any]:
    """Every sample that counts, and the floors."""
    return {
        "machine": report.facts,
        "threads": report.threads,
        "quick": report.quick,
        "workloads": [asdict(workload) for workload in report.workloads],
        "rates": None if report.machine is None else asdict(report.machine),
        "refused": dict(report.refused),
        "rows": [
            {
                "name": row.name,
                "group": row.group,
                "about": row.about,
                **(report.of(row)[-1].about if report.of(row) else {}),
                "figures": {key: asdict(value) for key, value in report.figures(row).items()},
                "floors": report.floors(row),
            }
            for row in report.rows
        ],
    }


def markdown(report: Report) -> str:
    """The whole report."""
    parts = [_heading(report)]
    parts += [_group(report, group) for group in GROUPS if any(row.group == group for row in report.rows)]
    parts += [_across(report), _floors(report), _about(report)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _heading(report: Report) -> str:
    facts = report.facts
    lines = [
        "# opsin and other engines, at equal bits",
        "Written by `make bench-peers`. A synthetic Qwen2-VL checkpoint (Qwen2-0.5B text dimensions, "
        f"12-layer vision tower of width 640, random bfloat16 weights), pictures of {IMAGE_SIDE} x "
        f"{IMAGE_SIDE}, prompts of {image_tokens()} picture and {TEXT_TOKENS[0]} to {TEXT_TOKENS[1]} text "
        f"tokens, greedy. First and later tokens: {report.workloads[0].title}; then "
        + "; ".join(w.title for w in report.workloads[1:])
        + ".",
        "![Times of opsin and other engines](peers.svg)",
        f"- {facts['cpu']}, {report.threads} of {facts['cores']} cores used, "
        f"{facts['memory bytes'] / 2**30:.0f} GiB, {', '.join(facts['instruction sets']) or 'no AVX'}\n"
        f"- {facts['system']}, Python {facts['python']}, torch {facts['torch']}",
        "Every row takes turns with all others (A B C, A B C): a fresh process gets ready, warms up, runs "
        "everything and ends. Median (least to most, number of samples). A sample is clean if other "
        f"processes, and other machines on the same processor, used at most {CLEAN:.0%} of the cores "
        "meanwhile; where some are clean, only they count; a `~` marks a figure of disturbed samples. Image "
        "processing, tokenization and detokenization are inside. Ready: from importing the libraries to the "
        "first request, the model's files being in the system's cache. Private memory has no mapped files.",
    ]
    if report.quick:
        lines.insert(1, "**A quick run: too small for its figures to mean anything.**")
    return "\n\n".join(lines)


def _group(report: Report, group: str) -> str:
    rows = [row for row in report.rows if row.group == group]
    columns = [column for column in COLUMNS if any(column.key in report.figures(row) for row in rows)]
    lines = [
        [row.name, *(shown(column, report.figures(row).get(column.key)) for column in columns)]
        for row in rows
    ]
    parts = [f"## {group}", _table([group, *(column.title for column in columns)], lines)]
    ours = next((row for row in reversed(rows) if row.peer == "opsin"), None)
    if ours and len(rows) > 1:
        parts += [
            f"Times over those of {ours.name} (above 1: opsin is faster, or uses less):",
            _table(["", *(column.title for column in columns)], _ratios(report, ours, rows, columns)),
        ]
    return "\n\n".join(parts)


def _ratios(report: Report, ours: Row, rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    own = report.figures(ours)
    lines = []
    for row in rows:
        if row is ours:
            continue
        theirs = report.figures(row)
        cells = [
            f"{theirs[c.key].median / own[c.key].median:.2f}x" if c.key in theirs and c.key in own else "–"
            for c in columns
        ]
        lines.append([row.name, *cells])
    return lines


def _across(report: Report) -> str:
    """What fewer bits gain inside opsin."""
    rows = [row for row in report.rows if row.peer == "opsin"]
    first = next((row for row in rows if row.group == FLOAT), None)
    if first is None or len(rows) < 2:
        return ""
    columns = [column for column in COLUMNS if column.key in report.figures(first)]
    lines = []
    for row in rows:
        figures = report.figures(row)
        cells = [
            f"{figures[c.key].median / report.figures(first)[c.key].median:.2f}x" if c.key in figures else "–"
            for c in columns
        ]
        lines.append([row.name, *cells])
    return "\n\n".join(
        [
            "## opsin's own forms",
            f"Times and memory as a share of those of {first.name}:",
            _table(["", *(column.title for column in columns)], lines),
        ]
    )


def _floors(report: Report) -> str:
    machine = report.machine
    if machine is None:
        return ""
    lines = []
    for row in report.rows:
        floors, figures = report.floors(row), report.figures(row)
        cells = []
        for column in COLUMNS[:3]:
            if column.key not in floors:
                cells.append("–")
                continue
            least = f"{floors[column.key] * column.scale:.{column.digits}f}"
            found = figures.get(column.key)
            cells.append(f"{least} ({found.median / floors[column.key]:.2f}x)" if found else least)
        lines.append([row.name, *cells])
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in machine.rates.items())
    return "\n\n".join(
        [
            "## The machine's floors",
            f"Measured in the same run: memory is read at {machine.bandwidth / 1e9:.1f} GB/s at best, "
            f"matrices are multiplied at {rates}, by torch and oneDNN, which other libraries can surpass. A "
            "token of one request cannot come faster than its weights are read; a prompt cannot be computed "
            "faster than its products. In brackets: the measured time over the floor.",
            _table(["", *(column.title for column in COLUMNS[:3])], lines),
        ]
    )


def _about(report: Report) -> str:
    reference = [turn for turn in report.turns if turn.row == AGREEMENT_WITH]
    lines = []
    for row in report.rows:
        turns = report.of(row)
        about = turns[-1].about if turns else {}
        same = agreement(turns, reference)
        prompts = _prompt_tokens(turns)
        lines.append(
            [
                row.name,
                about.get("version", ""),
                about.get("computes in", ""),
                row.about,
                prompts,
                "–" if same is None else f"{same:.0%}",
            ]
        )
    columns = ["", "version", "computes in", "settings", "prompt tokens of one request"]
    parts = [
        "## What ran",
        f"The last column: tokens before the first difference from {AGREEMENT_WITH}, of the first request of "
        "every workload. Weights are random, so it says that the work is the same, and nothing of what fewer "
        "bits cost in answers: after one difference, two texts go their own ways.",
        _table([*columns, "same tokens"], lines),
    ]
    if report.refused:
        parts.append(
            "Not in the tables:\n\n" + "\n".join(f"- {k}: {why}" for k, why in report.refused.items())
        )
    return "\n\n".join(parts)


def _prompt_tokens(turns: Sequence[Turn]) -> str:
    counts = sorted(s["num_prompt_tokens"] for turn in turns for s in turn.samples.get("latency", []))
    return f"{counts[0]} to {counts[-1]}" if counts else "–"


def shown(column: Column, found: Figure | None) -> str:
    """A figure with its spread."""
    if found is None:
        return "–"
    low, middle, high = (
        f"{value * column.scale:.{column.digits}f}"
        for value in (min(found.values), found.median, max(found.values))
    )
    spread = f"n{len(found.values)}" if low == high else f"{low}–{high}, n{len(found.values)}"
    return f"{'' if found.clean else '~'}**{middle}** ({spread})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
