"""``opsin new-plugin``: a package that installs, passes its own tests and is found before it is changed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from opsin.cli.errors import Debug, reported
from opsin.errors import ConfigError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

app = App(
    "new-plugin",
    help_epilogue="""Examples:

  opsin new-plugin model mine && pip install ./mine && pytest mine
  opsin new-plugin device mychip --folder ./mychip
  opsin new-plugin model mine --like ARCHITECTURE
""",
)


@app.default
@reported
def run(
    kind: Annotated[Literal["model", "device"], Parameter(help="What the plugin provides.")],
    name: Annotated[str, Parameter(help="Its name, such as mine: small letters, digits and _.")],
    *,
    like: Annotated[
        str | None,
        Parameter(
            help="Start from an installed family, by its architecture: its modules are copied and renamed "
            "(its licence goes with them), and its tests are yours to write."
        ),
    ] = None,
    folder: Annotated[
        Path | None, Parameter(help="Where to write; by default ./NAME. Must not exist.")
    ] = None,
    as_json: Annotated[bool, Parameter("--json", help="Print one JSON object with the files.")] = False,
    debug: Debug = False,
) -> None:
    """Write the package of a new plugin, and say what to do next."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"{name!r} cannot be a plugin's name; expected small letters, digits and _")
    if like is not None and kind != "model":
        raise ConfigError("--like is for models")
    target = Path(name) if folder is None else folder
    if target.exists():
        raise ConfigError(f"{target} exists, and nothing is written over; choose another name or --folder")
    written = dict(_template(kind, name))
    if like is not None:
        written |= _like(like, name, written)
    for path, text in written.items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    shown = f"{'models' if kind == 'model' else 'device'}_{name}"
    if as_json:
        print(json.dumps({"folder": str(target), "files": sorted(written)}, indent=2))
        return
    print(
        f"Wrote {len(written)} files to {target}. Next:\n\n"
        f"  pip install -e {target}     # --no-deps --no-build-isolation without a network\n"
        f"  opsin plugins               # shows {shown}\n"
        f"  pytest {target}\n\n"
        f"Then change {target}/src step by step, and run the tests after each. The guide: "
        f"docs/write-a-{kind}-plugin.md of opsin."
    )


def _template(kind: str, name: str) -> Iterator[tuple[str, str]]:
    """(path, text) of each file of a new package."""
    group = "models" if kind == "model" else "device"
    for part in ("both", kind):
        for path, text in _files(files("opsin").joinpath(f"data/new_plugin/{part}"), ""):
            path = _renamed(path.removesuffix(".in"), {"newname": name, "newgroup": group})
            text = _renamed(text, {"newname": name, "NewName": _class(name)})
            yield re.sub("^github/", ".github/", path), text


def _files(folder: Traversable, path: str) -> Iterator[tuple[str, str]]:
    for entry in sorted(folder.iterdir(), key=lambda each: each.name):
        if entry.is_dir():
            yield from _files(entry, f"{path}{entry.name}/")
        elif entry.name.endswith(".in"):
            yield f"{path}{entry.name}", entry.read_text(encoding="utf-8")


def _class(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


def _like(architecture: str, name: str, template: Mapping[str, str]) -> dict[str, str]:
    """An installed family's modules under new names instead of the template's, and a test of them."""
    import importlib

    from opsin.plugins import load_plugins

    found = load_plugins()
    spec = found.model(architecture)
    package = spec.build.__module__.partition(".")[0]
    origin = Path(str(importlib.import_module(package).__file__)).parent
    own = f"opsin_models_{name}"
    [owner] = [c.plugin for c in found.claims if c.kind == "model" and c.key == architecture]
    theirs = [c.key for c in found.claims if c.kind == "model" and c.plugin == owner]
    # One architecture becomes the new one; the family's others are kept apart by the name before them.
    names = {key: f"{_class(name)}{key}" for key in theirs}
    names[architecture] = f"{_class(name)}ForConditionalGeneration"
    pattern = re.compile("|".join(sorted(map(re.escape, [*names, package]), key=len, reverse=True)))
    replaced = {**names, package: own}
    copied = {
        f"src/{own}/{file.relative_to(origin).as_posix()}": pattern.sub(
            lambda match: replaced[match[0]], file.read_text(encoding="utf-8")
        )
        for file in sorted(origin.rglob("*.py"))
    }
    for path in template:
        if path.startswith(f"src/{own}/") and path not in copied:
            copied[path] = '"""Left from the template, unused: remove it."""\n'
    copied[f"tests/test_{name}.py"] = (
        f'"""A copy of {package}: what it registers. Next: opsin.testing.models on a tiny_checkpoint."""\n\n'
        f"from {own}.plugin import opsin_register_models\n\n\n"
        "def test_it_registers():\n"
        f'    assert "{names[architecture]}" in {{spec.architecture for spec in opsin_register_models()}}\n'
    )
    return copied
