"""Records the public API, one line per name, in tests/api/MAJOR.MINOR.txt; compares two such records.

    python tools/api_snapshot.py                    # of this working tree
    python tools/api_snapshot.py --source FOLDER    # of another one's core/src

A record of a released version is not written again: an addition needs a new API_MINOR.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import griffe

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "core/src"
RECORDS = ROOT / "tests/api"
CHANGES = ROOT / "docs/api-changes.md"
PUBLIC = ("opsin", "opsin.api", "opsin.hookspecs", "opsin.layers", "opsin.testing")
VERSIONS = ("opsin.__version__", "opsin.api.API_MINOR")
"""Constants whose value is meant to change."""

_ENTRY = re.compile(r"(?:(async def|def|class|dataclass) )?([\w.]+)(.*)")
_NOT_API = ("__init__", "__post_init__", "__repr__")


def public_api(source: Path, modules: Sequence[str] = PUBLIC) -> list[str]:
    """Every public name of the modules: with its signature, type or value.

    A module's public names are those of its ``__all__``; without one, those it defines itself, submodules
    included. Nothing is imported. Members inherited inside of the package count as the class's own.
    """
    package = _loaded(source, modules[0].partition(".")[0])
    lines = [line for name in modules for line in _described(name, package[name])]
    return sorted(lines, key=lambda line: _parsed(line).name)


def _loaded(source: Path, package: str) -> griffe.ModulesCollection:
    loader = griffe.GriffeLoader(search_paths=[source], allow_inspection=False)
    loader.load(package)
    loader.resolve_aliases(implicit=True, external=False)
    return loader.modules_collection


def _described(name: str, member: griffe.Object | griffe.Alias) -> Iterator[str]:
    """The lines of a name and of what is in it."""
    target = member.final_target if isinstance(member, griffe.Alias) else member
    if isinstance(target, griffe.Module):
        for inner in target.members.values():
            own = not inner.is_alias and not inner.name.startswith("_")
            if own if target.exports is None else inner.is_exported:
                yield from _described(f"{name}.{inner.name}", inner)
    elif isinstance(target, griffe.Class):
        fields = {parameter.name for parameter in target.parameters} if "dataclass" in target.labels else ()
        yield f"{'dataclass' if fields else 'class'} {target.signature(name=name) or name}"
        for inner in target.all_members.values():
            special = inner.name.startswith("__") and inner.is_function and inner.name not in _NOT_API
            if special or not (inner.name.startswith("_") or inner.name in fields):
                yield from _described(f"{name}.{inner.name}", inner)
    elif isinstance(target, griffe.Function):  # of overloads the implementation, which takes them all
        kind = "async def" if "async" in target.labels else "def"
        yield f"{kind} {target.signature(name=name)}"
    elif isinstance(target, griffe.Attribute):
        if target.parent is not None and target.parent.is_class:
            yield name if target.annotation is None else f"{name}: {target.annotation}"
        else:
            yield name if name in VERSIONS else f"{name} = {target.value}"


@dataclass(frozen=True)
class Entry:
    """A line of a record: what it is, its name, and what follows the name."""

    kind: str | None
    name: str
    rest: str


@dataclass(frozen=True)
class Change:
    """A difference between two records.

    Attributes:
        name: as docs/api-changes.md writes it; of a parameter ``function(parameter=)``, of a literal
            ``type(value)``.
        what: happened to it.
        breaks: code written against the older record may fail.
    """

    name: str
    what: str
    breaks: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def changes(old: Iterable[str], new: Iterable[str]) -> list[Change]:
    """What is different in the newer record; a class's members go with the class."""
    before = {entry.name: entry for entry in map(_parsed, old)}
    after = {entry.name: entry for entry in map(_parsed, new)}
    found = [Change(name, "was removed", True) for name in _outermost(before.keys() - after.keys())]
    found += [Change(name, "was added", False) for name in _outermost(after.keys() - before.keys())]
    for name in before.keys() & after.keys():
        found.extend(_entry_changes(before[name], after[name]))
    return sorted(found, key=lambda change: change.name)


def _parsed(line: str) -> Entry:
    match = _ENTRY.fullmatch(line)
    assert match is not None, line
    return Entry(*match.groups())


def _outermost(names: Collection[str]) -> Iterator[str]:
    return (name for name in names if name.rpartition(".")[0] not in names)


def _entry_changes(old: Entry, new: Entry) -> Iterator[Change]:
    if old.kind != new.kind:
        yield Change(new.name, f"was a {old.kind or 'value'}, is a {new.kind or 'value'}", True)
    elif old.kind:
        yield from _signature_changes(new.name, old.rest, new.rest)
    elif old.rest.startswith(" = Literal[") and new.rest.startswith(" = Literal["):
        choices, now = ast.literal_eval(old.rest[10:]), ast.literal_eval(new.rest[10:])
        for choice in choices:
            if choice not in now:
                yield Change(f"{new.name}({choice})", "was removed", True)
        for choice in now:
            if choice not in choices:
                yield Change(f"{new.name}({choice})", "was added", False)
    elif old.rest != new.rest:
        yield Change(new.name, f"was{old.rest}, is{new.rest}", old.rest.startswith(" ="))


Way = Literal["position", "any", "name", "*", "**"]
"""How a parameter is given; ``any``: by position or by name."""


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        way: how it is given.
        type, default: as in the source; None: there is none.
    """

    way: Way
    type: str | None
    default: str | None


def _signature_changes(name: str, old: str, new: str) -> Iterator[Change]:
    (before, returned), (after, returns) = _signature(old), _signature(new)
    positions = [key for key, parameter in after.items() if parameter.way in ("position", "any")]
    takes_names = any(parameter.way == "**" for parameter in after.values())
    place = 0
    for key, was in before.items():
        now = after.get(key)
        label = f"{name}({key}=)"
        by_position = was.way in ("position", "any")
        if now is None and was.way == "name" and takes_names:
            pass  # the function looks at the names itself
        elif now is None:
            yield Change(label, "was removed", True)
        elif by_position and key not in positions[place : place + 1]:
            yield Change(label, "has another position", True)
        elif now.way not in (was.way, "any"):
            yield Change(label, f"was given by {was.way}, is given by {now.way}", True)
        elif was.default is not None and was.default != now.default:
            yield Change(label, f"its default was {was.default}, is {now.default}", True)
        elif was.type != now.type:
            yield Change(label, f"its type was {was.type}, is {now.type}", False)
        place += by_position
    for key, now in after.items():
        if key not in before:
            needed = now.default is None and not now.way.startswith("*")
            yield Change(f"{name}({key}=)", "was added" + " without a default" * needed, needed)
    if returned != returns:
        yield Change(name, f"returned {returned}, returns {returns}", False)


def _signature(text: str) -> tuple[Mapping[str, Parameter], str | None]:
    """Parameters and return type of ``(...) -> ...``; of nothing there are none."""
    parsed = ast.parse(f"def f{text or '()'}: ...").body[0]
    assert isinstance(parsed, ast.FunctionDef)
    arguments = parsed.args
    found: dict[str, Parameter] = {}

    def add(way: Way, argument: ast.arg | None, default: ast.expr | None = None) -> None:
        if argument is not None:
            name = way if way.startswith("*") else argument.arg  # what collects the rest is not given by name
            found[name] = Parameter(way, _source(argument.annotation), _source(default))

    by_position = [*arguments.posonlyargs, *arguments.args]
    no_default = [None] * (len(by_position) - len(arguments.defaults))
    for argument, default in zip(by_position, [*no_default, *arguments.defaults]):
        add("position" if argument in arguments.posonlyargs else "any", argument, default)
    add("*", arguments.vararg)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        add("name", argument, default)
    add("**", arguments.kwarg)
    return found, _source(parsed.returns)


def _source(node: ast.expr | None) -> str | None:
    return None if node is None else ast.unparse(node)


def api_version(source: Path) -> str:
    """API_MAJOR.API_MINOR of a source tree."""
    api = _loaded(source, "opsin")["opsin.api"]
    return f"{api['API_MAJOR'].value}.{api['API_MINOR'].value}"


def unlisted(found: Iterable[Change], version: str) -> list[Change]:
    """Changes that docs/api-changes.md does not list under a version; ``*`` in it stands for any text."""
    listed = re.findall(r"`([^`]+)`", _section(version))
    return [change for change in found if not any(fnmatchcase(change.name, name) for name in listed)]


def released(version: str) -> bool:
    """Whether the version's record is final."""
    return "(unreleased)" not in _section(version).partition("\n")[0]


def _section(version: str) -> str:
    sections = re.split(r"^## ", CHANGES.read_text(), flags=re.MULTILINE)
    return next((text for text in sections if text.split()[:1] == [version]), "")


def read(version: str) -> list[str]:
    """The record of a version."""
    return (RECORDS / f"{version}.txt").read_text().splitlines()


def main() -> None:
    """Write the record of a source tree."""
    parser = argparse.ArgumentParser(description="Record the public API.")
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder that holds the package opsin")
    source = parser.parse_args().source
    name = api_version(source)
    file = RECORDS / f"{name}.txt"
    if file.exists() and released(name):
        sys.exit(f"API {name} is released and its record final; raise API_MINOR in opsin/api/specs.py")
    file.write_text("".join(f"{line}\n" for line in public_api(source)))
    print(f"recorded {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
