"""``opsin plugins``: what is installed, and who provides what."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from opsin.cli.errors import Debug, reported

if TYPE_CHECKING:
    from opsin.plugins import Plugins

AsJson = Annotated[bool, Parameter("--json", help="Print one JSON object instead.")]


app = App(
    "plugins",
    help_epilogue="""OPSIN_PLUGINS and OPSIN_DISABLE_PLUGINS name plugins to use and to leave out.
Two plugins that claim the same key are an error; OPSIN_PREFER
(KIND:KEY=PLUGIN) decides.
""",
)


@app.default
@reported
def run(*, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show the installed plugins, what they provide, and which of them failed."""
    from opsin.plugins import load_plugins

    found = load_plugins()
    report = describe_plugins(found)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print_plugins(report)


def describe_plugins(found: Plugins) -> dict[str, Any]:
    """Plugins and installed checkpoints as plain data, with what to do about what is missing."""
    from opsin.api import API_MAJOR, API_MINOR, CHECKPOINT_GROUP

    names = sorted({entry.name for entry in entry_points(group=CHECKPOINT_GROUP)})
    checkpoints = [_describe_checkpoint(found, name) for name in names]
    return {
        "api": f"{API_MAJOR}.{API_MINOR}",
        "plugins": [{"name": p.name, "distribution": p.distribution} for p in found.loaded],
        "failures": [
            {"name": f.plugin.name, "distribution": f.plugin.distribution, "reason": f.reason}
            for f in found.failures
        ],
        "disabled": [{"name": p.name, "distribution": p.distribution} for p in found.disabled],
        "provides": [{"kind": o.kind, "key": o.key, "plugin": o.plugin.name} for o in found.claims],
        "checkpoints": checkpoints,
        "advice": [
            *_missing_kinds(found),
            *found.notes,
            *(c["problem"] for c in checkpoints if c["problem"]),
        ],
    }


def _describe_checkpoint(found: Plugins, name: str) -> dict[str, Any]:
    """An installed checkpoint, its architecture, and why it cannot run, if so."""
    from opsin.checkpoint.files import load
    from opsin.errors import OpsinError

    architecture = None
    try:
        architecture = load(name).architecture
        found.model(architecture)
    except OpsinError as error:
        return {"name": name, "architecture": architecture, "problem": f"{name}: {error}"}
    return {"name": name, "architecture": architecture, "problem": None}


def _missing_kinds(found: Plugins) -> list[str]:
    """What to install where no plugin provides any model, or any device."""
    from opsin.plugins.known_packages import known_packages, pip_install

    kinds = {claim.kind for claim in found.claims}
    known = known_packages()
    advice = []
    for kind, provided in (("model", known.architectures), ("device", known.devices)):
        if kind not in kinds:
            names = sorted(set(provided.values()))
            how = f"install one of {', '.join(names)}, for example: {pip_install(names[-1])}"
            advice.append(f"no plugin provides a {kind}; {how}")
    return advice


def print_plugins(report: dict[str, Any]) -> None:
    """The tables of ``opsin plugins``, for people."""
    from opsin.cli.printing import print_table

    names = ("name", "distribution")
    print_table("Plugins", names, [[p[n] for n in names] for p in report["plugins"]])
    kinds = ("kind", "key", "plugin")
    print_table("Provided", kinds, [[p[n] for n in kinds] for p in report["provides"]])
    if report["checkpoints"]:
        rows = [[c["name"], c["architecture"] or "unknown"] for c in report["checkpoints"]]
        print_table("Installed checkpoints", ("model", "architecture"), rows)
    if report["failures"]:
        columns = ("name", "distribution", "reason")
        print_table("Failed", columns, [[f[n] for n in columns] for f in report["failures"]])
    if report["disabled"]:
        print_table("Switched off", names, [[p[n] for n in names] for p in report["disabled"]])
    for line in report["advice"]:
        print(f"- {line}")
