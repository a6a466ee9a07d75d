"""The core knows no model family and no chip: their names occur nowhere in it but in its data files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "core/src/opsin"
KNOWN = CORE / "data/known_packages.json"
"""Which package to install for what; the one file that names families and devices, and no code."""

NAMES = re.compile(
    r"llava|phi[-_ ]?3|vlm2vec|qwen|minicpm|openbmb|vicuna|llama(?!3\")|mistral|idefics|"
    r"smol|internvl|internvit|internlm|cambricon|\bmlu",
    re.IGNORECASE,
)
"""Families, the language models inside of them, makers, chips; however they are spelt. (One in quotation
marks with a 3 is a type of rotary positions in config.json.)"""


def named_in(text: str) -> list[str]:
    return [found.group() for found in NAMES.finditer(text)]


def test_no_family_and_no_chip_is_named_in_core() -> None:
    files = [file for file in CORE.rglob("*") if file.is_file() and file.suffix != ".pyc" and file != KNOWN]
    assert len(files) > 60, "the whole core is read: code, comments, docstrings, the page"
    found = []
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        found += [
            f"{file.relative_to(CORE)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, 1)
            if named_in(line)
        ]
        found += [f"{file.relative_to(CORE)}: its name"] * bool(named_in(str(file.relative_to(CORE))))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("kind", ["architectures", "devices", "checkpoints"])
def test_the_names_looked_for_are_those_of_all_plugins(kind: str) -> None:
    """Whoever adds a family adds its name above: every architecture and device of ours is recognised."""
    known = json.loads(KNOWN.read_text())[kind]
    assert known
    unnamed = [name for name in known if name != "cpu" and not named_in(name)]
    assert not unnamed, f"add their families' names to NAMES: {unnamed}"


def test_every_plugin_folder_is_recognised() -> None:
    folders = [file.parent.name for file in (ROOT / "plugins").glob("*/pyproject.toml")]
    assert len(folders) >= 6
    assert [
        name
        for name in folders
        if name not in ("device_cpu", "weight_formats") and not named_in(name.replace("_", " "))
    ] == []
