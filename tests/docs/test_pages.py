"""The pages of the library run word for word, and print what stands in them."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.docs.page import blocks, run

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"using-vlms.md": 12, "library.md": 8}
"""Page -> blocks whose output it shows, at least."""


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DOCS.parent)


@pytest.mark.parametrize("name", PAGES)
def test_a_page(name: str) -> None:
    page = (DOCS / name).read_text()
    shown = list(run(page))
    assert len(shown) >= PAGES[name]
    for block, printed in shown:
        assert printed == block.text, block.text
        assert printed.strip(), "a block that prints nothing shows nothing"


@pytest.mark.parametrize("name", PAGES)
def test_every_output_stands_under_a_block_that_prints(name: str) -> None:
    found = [block.kind for block in blocks((DOCS / name).read_text())]
    for before, kind in pairwise(found):
        assert kind != "text" or before == "python"


def test_what_holds_is_counted_as_it_stands() -> None:
    text = (DOCS / "using-vlms.md").read_text().partition("## What of vLLM's page holds")[2]
    verdicts = [row.split(" | ")[1] for row in re.findall(r"^\| .*", text, re.M)[1:]]
    kinds = ("verbatim", "with a change", "not")
    counts = [sum(verdict.startswith(kind) for verdict in verdicts) for kind in kinds]
    assert sum(counts) == len(verdicts)
    assert "Verbatim {}, with a change {}, not {}.".format(*counts) in text
