"""The code of the model guide is what ``opsin new-plugin`` writes; tests/core/test_new_plugin.py runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opsin.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-model-plugin.md").read_text()
FILES = dict(re.findall(r"^\*\*([\w./]+)\*\*:\n\n```python\n(.*?)^```$", PAGE, re.S | re.M))


def test_every_block_is_a_file_that_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as done:
        main(["new-plugin", "model", "mine", "--folder", str(tmp_path / "mine")])
    assert not done.value.code
    assert len(FILES) == PAGE.count("```python") == 4
    for name, text in FILES.items():
        assert (tmp_path / "mine" / name).read_text().rstrip() == text.rstrip(), name


def test_a_whole_family_is_small() -> None:
    """Lines of code of the three modules, without blank ones and texts."""
    code = "".join(text for name, text in FILES.items() if name.startswith("src/"))
    assert sum(bool(line.strip()) for line in code.splitlines()) < 110
