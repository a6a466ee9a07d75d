"""What the site has besides docs/: README and its kind, examples, results, the reference of the public API.

A hook of mkdocs. Pages keep the links that they need in the repository; here those that lead out of docs/ are
turned to where the same thing lies in the site.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {f"benchmarks/results/{name}.md": f"benchmarks/{name}.md" for name in ("peers", "latest")}
FILES = {
    "benchmarks/results/peers.svg": "benchmarks/peers.svg",
    "core/src/opsin/server/ui/icon.svg": "ui/icon.svg",
}
REFERENCE = {"opsin": "opsin", "opsin.api": "api", "opsin.layers": "layers", "opsin.testing": "testing"}
_LINK = re.compile(r"(\]\(|<img src=\")([^)\s\"#:]+)(?=[#)\"])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every decision and every example has its place in the navigation."""
    more = {
        "Decisions": [f"decisions/{path.name}" for path in sorted((ROOT / "docs/decisions").glob("0*.md"))],
        "Examples": [f"examples/{path.name}.md" for path in _examples()],
    }

    def grown(entry: dict[str, object]) -> dict[str, object]:
        [(title, content)] = entry.items()
        if isinstance(content, list):
            return {title: [grown(each) for each in content]}
        return {title: [content, *more[title]]} if title in more else entry

    config.nav = [grown(entry) for entry in config.nav or []]
    return config


def _examples() -> list[Path]:
    return sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".jinja"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what does not lie in docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    for source, target in FILES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for module, name in REFERENCE.items():
        files.append(File.generated(config, f"reference/{name}.md", content=_reference(module)))
    rows = []
    for path in _examples():
        code, target = path.read_text(), f"examples/{path.name}.md"
        about = ast.get_docstring(ast.parse(code)) if path.suffix == ".py" else "A chat template."
        rows.append(f"| [{path.name}]({path.name}.md) | {(about or '').splitlines()[0]} |")
        text = f"# {path.name}\n\n```{'python' if path.suffix == '.py' else 'jinja'}\n{code}```\n"
        files.append(File.generated(config, target, content=text))
    index = (
        "# Examples\n\nRunnable as they are, on the tiny models.\n\n| script | what it shows |\n|---|---|\n"
    )
    files.append(File.generated(config, "examples/README.md", content=index + "\n".join(rows) + "\n"))
    return files


def _reference(module: str) -> str:
    """Every public name of a module, in the order of its ``__all__``."""
    init = ROOT / "core/src" / module.replace(".", "/") / "__init__.py"
    names: list[str] = []
    for node in ast.parse(init.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = [ast.literal_eval(each) for each in getattr(node.value, "elts", [])]
    parts = [f"::: {module}.{name}\n    options: {{heading_level: 2}}" for name in names if name[0] != "_"]
    return f"# {module}\n\n" + "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links that lead out of docs/ to what `on_files` has added; what is not in the site is words."""
    target = page.file.src_uri
    source = next((name for name, added in PAGES.items() if added == target), f"docs/{target}")

    def turned(found: re.Match[str]) -> str:
        start, link = found.groups()
        meant = normpath(str(PurePosixPath(source).parent / link))
        inside = _in_site(meant)
        if inside is None:
            return f"{start}https://opsin.invalid/{meant}"
        return start + relpath(inside, str(PurePosixPath(target).parent))

    if target.startswith(("reference/", "examples/")):
        return markdown
    turned_text = _LINK.sub(turned, markdown)
    # What is not in the site (folders of the repository) stays as words.
    return re.sub(r"\[([^\]]+)\]\(https://opsin\.invalid/[^)]*\)", r"\1", turned_text)


def _in_site(path: str) -> str | None:
    if path in PAGES or path in FILES:
        return PAGES.get(path) or FILES[path]
    if path == "examples":
        return "examples/README.md"
    if path.startswith("examples/") and (ROOT / path).is_file():
        return f"{path}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") and (ROOT / path).is_file() else None
