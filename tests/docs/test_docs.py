"""What the documentation promises."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from opsin import hookspecs

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_every_hook_has_its_exact_signature_as_a_heading() -> None:
    text = (ROOT / "docs" / "hooks.md").read_text()
    hooks = [item for name, item in vars(hookspecs).items() if name.startswith("opsin_register_")]
    assert len(hooks) == 6
    for hook in hooks:
        signature = str(inspect.signature(hook)).replace("'", "")
        assert f"## `{hook.__name__}{signature}`" in text
    assert len(re.findall(r"^## `opsin_", text, re.M)) == len(hooks), "a heading for a hook that is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_are_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(block, str(page), "exec")


DECISIONS = ROOT / "docs" / "decisions"
DECIDED = sorted(page for page in DECISIONS.glob("*.md") if page.name != "README.md")


def test_every_decision_is_in_the_index_once() -> None:
    """With its number and its title, in order."""
    index = (DECISIONS / "README.md").read_text()
    rows = re.findall(r"^\| \[(\d{4})\]\(([^)]+)\) \| (.*?) \| .+ \|$", index, re.M)
    headings = [page.read_text().partition("\n")[0] for page in DECIDED]
    expected = [(page.name[:4], page.name, heading) for page, heading in zip(DECIDED, headings)]
    assert [(number, name, f"# {int(number)}. {title}") for number, name, title in rows] == expected
    assert len(re.findall(r"\(\d{4}-[\w-]+\.md\)", index)) == len(DECIDED), "a page is linked twice"


def test_every_decision_has_a_number_of_a_range() -> None:
    index = (DECISIONS / "README.md").read_text()
    ranges = [(int(first), int(last)) for first, last in re.findall(r"^\| (\d{4})-(\d{4}) \|", index, re.M)]
    numbers = [int(page.name[:4]) for page in DECIDED]
    assert len(set(numbers)) == len(numbers)
    for number in numbers:
        assert sum(first <= number <= last for first, last in ranges) == 1, number


def test_every_decision_that_is_named_has_a_page() -> None:
    """In documentation and code: as ``decision 20`` or as ``docs/decisions/0020``, the rest optional."""
    folders = ["core", "plugins", "tests", "docs", "benchmarks", "examples", "demo", "tools"]
    files = [
        file for folder in folders for file in (ROOT / folder).rglob("*.*") if file.suffix in (".py", ".md")
    ]
    names = {page.stem for page in DECIDED}
    numbers = {name[:4] for name in names}
    found = 0
    for file in {*files, *PAGES}:
        text = file.read_text()
        where = str(file.relative_to(ROOT))
        for number, rest in re.findall(r"decisions/(\d{4})([\w-]*)", text):
            assert (number + rest in names) if rest else (number in numbers), f"{where}: {number}{rest}"
            found += 1
        for number in re.findall(r"\b[Dd]ecisions? (\d+)\b", text):
            assert f"{int(number):04}" in numbers, f"{where}: decision {number}"
    assert found >= 10, "references are recognised"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_dotted_names_in_backticks_exist(page: Path) -> None:
    """Modules and names of the package, as ``opsin.engine.scheduler`` or ``opsin.api.ModelSpec``."""
    if page.name == "api-changes.md":  # tests/api compares it with the recorded API
        return
    for name in re.findall(r"`(opsin(?:\.\w+)+)`", page.read_text()):
        if not re.search(r"\.v\d+$", name):  # an entry-point group
            assert exists(name), f"{page.name}: {name}"


def exists(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[end:])
    return False


GUIDES = ["tour.md", "hooks.md", "write-a-model-plugin.md", "write-a-device-plugin.md"]


@pytest.mark.parametrize("page", GUIDES)
def test_files_named_in_backticks_exist(page: str) -> None:
    places = [ROOT, ROOT / "core/src/opsin", ROOT / "plugins/models_qwen2vl"]
    places.append(ROOT / "plugins/models_qwen2vl/src/opsin_models_qwen2vl")
    for name in re.findall(r"`([\w/]+\.(?:py|toml|json)|[\w/]+/)`", (ROOT / "docs" / page).read_text()):
        assert any((place / name).exists() for place in places), name


def test_the_first_command_of_the_readme_gives_the_answer_below_it() -> None:
    text = (ROOT / "README.md").read_text()
    [(command, answer)] = re.findall(r"^opsin (generate .*)\n```\n\n> (.*)$", text, re.M)
    done = subprocess.run(
        [sys.executable, "-m", "opsin", *shlex.split(command)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == answer, done.stderr


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for name in re.findall(r"`make ([a-z-]+)", page.read_text()):
            assert name in targets, f"{page.name} names make {name}"


def test_the_site_has_every_page() -> None:
    """But the decisions and the examples, which `tools/docs_site.py` adds."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert len(named) == len(set(named))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    pages -= {f"decisions/{page.name}" for page in DECIDED}
    added = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
    assert all((ROOT / source).exists() for source in added)
    others = {name for name in named if name.startswith(("reference/", "benchmarks/", "examples/"))}
    assert set(named) - others == pages | set(added.values())
