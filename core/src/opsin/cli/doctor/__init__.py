"""``opsin doctor``: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import App, Parameter

import opsin
from opsin.cli.errors import Debug, reported
from opsin.cli.plugins import AsJson, describe_plugins, print_plugins
from opsin.errors import ConfigError

if TYPE_CHECKING:
    from opsin.api import Device, DeviceSpec
    from opsin.plugins import Plugins

_RANKS = (2, 4)
"""Numbers of tensor-parallel ranks whose places are shown."""

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "pluggy",
)


app = App(
    "doctor",
    help_epilogue="""The exit status is 1 when something needs attention: a plugin failed,
there is no model or device, the device asked for cannot be used, or a check failed.
""",
)


@app.default
@reported
def run(
    *,
    as_json: AsJson = False,
    device: Annotated[
        str | None, Parameter(help="Open this device too (NAME or NAME:INDEX), and show its details.")
    ] = None,
    selftest: Annotated[
        bool, Parameter(help="Compare every kernel of --device with the reference, on the device itself.")
    ] = False,
    model: Annotated[
        str | None,
        Parameter(help="Load this checkpoint on --device, and check it against the contract of models."),
    ] = None,
    report: Annotated[
        Path | None,
        Parameter(help="Write all that was found, and what devices add to it, to this new ZIP file."),
    ] = None,
    debug: Debug = False,
) -> int:
    """Probe devices and plugins; say why something does not work and what to do next."""
    if report is not None and report.exists():
        raise ConfigError(f"{report} is there already; name a new file")
    found = examine(device, selftest=selftest, model=model)
    if as_json:
        print(json.dumps(found, indent=2, default=str))
    else:
        print_report(found)
    if report is not None:
        from opsin.cli.doctor.report import write_report

        names = write_report(report, found, _files_of_devices())
        print(f"Written to {report}: {', '.join(names)}", file=sys.stderr)
    return 1 if found["advice"] else 0


def _files_of_devices() -> dict[str, str | bytes]:
    from opsin.errors import PluginError
    from opsin.plugins import load_plugins

    files: dict[str, str | bytes] = {}
    try:
        specs = load_plugins().devices()
    except PluginError:
        return files
    for spec in specs:
        try:
            files |= {} if spec.report is None else spec.report()
        except Exception as error:  # a report of what does not work goes on without what does not work
            files[f"{spec.name}.txt"] = f"its report failed: {type(error).__name__}: {error}\n"
    return files


def examine(device: str | None, *, selftest: bool = False, model: str | None = None) -> dict[str, Any]:
    """Everything ``opsin doctor`` has to say, as plain data."""
    from opsin.errors import OpsinError, PluginError
    from opsin.plugins import load_plugins
    from opsin.rank.placement import place_ranks

    report: dict[str, Any] = {
        "opsin": opsin.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version_of(name) for name in PACKAGES},
    }
    try:
        found = load_plugins()
    except PluginError as error:
        return {**report, "advice": [str(error)]}
    report |= describe_plugins(found)
    report["ranks"] = {size: [str(place) for place in place_ranks(size)] for size in _RANKS}
    report["devices"] = [_describe_device(found, spec) for spec in found.devices()]
    report["kernels"] = _kernels(report)
    report["advice"] = [
        *report["advice"],
        *(f"plugin {f['name']} ({f['distribution']}) failed: {f['reason']}" for f in report["failures"]),
    ]
    if report["devices"]:
        try:
            chosen, index, _ = found.select_device(device or "auto")
            report["device"] = f"{chosen.name}:{index}"
            if device is not None or selftest:
                opened = found.open_device(chosen, index)
                report["opened"] = _describe_opened(opened)
                report["advice"] += [f"{name} is not used: {why}" for name, why in opened.declined.items()]
                if selftest:
                    from opsin.cli.doctor import selftest as tests  # it imports torch

                    report["selftest"] = tests.selftest(opened, found.kernel_specs(chosen.name))
                    report["advice"] += tests.advice(report["selftest"])
            if model is not None:
                from opsin.cli.doctor import selftest as tests

                report["model"] = tests.check_checkpoint(model, found, report["device"])
                report["advice"] += tests.failed_checks(model, report["model"])
        except OpsinError as error:
            report["advice"].append(str(error))
    return report


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _describe_device(found: Plugins, spec: DeviceSpec) -> dict[str, Any]:
    probe = found.probe(spec)
    return {
        "name": spec.name,
        "score": probe.score,
        "reason": probe.reason,
        "next_step": probe.next_step,
        "details": dict(probe.details),
    }


def _describe_opened(device: Device) -> dict[str, Any]:
    memory, can = device.memory(), device.capabilities
    mechanisms = [name for name in ("pinned_memory", "graphs") if getattr(can, name)]
    return {
        "torch device": device.torch_device,
        "free memory": f"{memory.free_bytes / 2**30:.1f} GiB of {memory.total_bytes / 2**30:.1f} GiB",
        "dtypes": ", ".join(can.dtypes),
        "communication": can.communication,
        "mechanisms": ", ".join(mechanisms) or "none",
        **device.details,
    }


def _kernels(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """For each device, which plugin brings an op; the others run on the reference."""
    from opsin.api import OpName

    owners = {p["key"]: p["plugin"] for p in report["provides"] if p["kind"] == "kernel"}
    return [
        {"device": device["name"], "op": op, "from": owners.get(f"{device['name']}/{op}", "reference")}
        for device in report["devices"]
        for op in get_args(OpName)
    ]


def print_report(report: Mapping[str, Any]) -> None:
    """The tables of ``opsin doctor``, for people."""
    from opsin.cli.printing import print_table

    versions = [[name, number or "not installed"] for name, number in report["packages"].items()]
    about = [["opsin", report["opsin"]], ["python", report["python"]], ["platform", report["platform"]]]
    print_table("Versions", ("what", "version"), about + versions)
    if "plugins" in report:
        provides = [p for p in report["provides"] if p["kind"] != "kernel"]
        print_plugins({**report, "provides": provides, "advice": []})
        devices = [[d["name"], str(d["score"]), d["reason"], d["next_step"]] for d in report["devices"]]
        print_table("Devices", ("name", "score", "reason", "next step"), devices)
        for device in report["devices"]:
            _print_details(f"Details of {device['name']}", device["details"])
        kernels = [[k["device"], k["op"], k["from"]] for k in report["kernels"]]
        print_table("Kernels", ("device", "op", "from"), kernels)
    _print_details(f"Opened {report.get('device')}", report.get("opened", {}))
    if "ranks" in report:
        placed = [
            (str(size), str(rank), where)
            for size, all_of in report["ranks"].items()
            for rank, where in enumerate(all_of)
        ]
        print_table("Tensor-parallel ranks", ("how many", "rank", "host cores"), placed)
    if "selftest" in report:
        from opsin.cli.doctor.selftest import rows

        columns = ("op", "dtype", "cases", "by the device", "by the reference", "failed", "worst error")
        print_table(f"Self-test of {report['device']}", columns, rows(report["selftest"]))
    if "model" in report:
        checks = [[c["check"], c["result"], c["detail"]] for c in report["model"]]
        print_table("Checks of the model", ("check", "result", "detail"), checks)
    if "device" in report:
        print(f"device={report['device']} is what a model would run on.")
    print("Everything is in order." if not report["advice"] else "To do:")
    for line in report["advice"]:
        print(f"- {line}")


def _print_details(title: str, details: Mapping[str, Any]) -> None:
    from opsin.cli.printing import print_table

    if details:
        print_table(title, ("what", "value"), [[str(name), str(value)] for name, value in details.items()])
