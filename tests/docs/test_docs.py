"""What the documentation promises."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from opsin import hookspecs

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_every_hook_has_its_exact_signature_as_a_heading() -> None:
    text = (ROOT / "docs" / "hooks.md").read_text()
    hooks = [item for name, item in vars(hookspecs).items() if name.startswith("opsin_register_")]
    assert len(hooks) == 5
    for hook in hooks:
        signature = str(inspect.signature(hook)).replace("'", "")
        assert f"## `{hook.__name__}{signature}`" in text
    assert len(re.findall(r"^## `opsin_", text, re.M)) == len(hooks), "a heading for a hook that is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_are_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(block, str(page), "exec")


GUIDES = ["tour.md", "hooks.md", "write-a-model-plugin.md", "write-a-device-plugin.md"]


@pytest.mark.parametrize("page", GUIDES)
def test_files_named_in_backticks_exist(page: str) -> None:
    places = [ROOT, ROOT / "core/src/opsin", ROOT / "plugins/models_qwen2vl"]
    places.append(ROOT / "plugins/models_qwen2vl/src/opsin_models_qwen2vl")
    for name in re.findall(r"`([\w/]+\.(?:py|toml|json)|[\w/]+/)`", (ROOT / "docs" / page).read_text()):
        assert any((place / name).exists() for place in places), name


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for name in re.findall(r"`make ([a-z-]+)", page.read_text()):
            assert name in targets, f"{page.name} names make {name}"
