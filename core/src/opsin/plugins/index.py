"""What the installed plugins provide, by key; and what to say when a key is missing."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsin.api import (
    Device,
    DeviceSpec,
    InputMapperSpec,
    KernelSpec,
    ModelSpec,
    PlaceholderSpec,
    Probe,
    WeightFormatSpec,
)
from opsin.errors import ConfigError, MissingPluginError, did_you_mean
from opsin.plugins.claims import Claim, Failure, Plugin, reason_of
from opsin.plugins.contract import DENY_VARIABLE
from opsin.plugins.known_packages import known_packages, pip_install

logger = logging.getLogger(__name__)

ALLOW_VARIABLE = "OPSIN_PLUGINS"


@dataclass(frozen=True, kw_only=True, eq=False)
class Plugins:
    """Everything the installed plugins provide. Made by `load_plugins`.

    Attributes:
        claims: who provides what, sorted by kind (in the order of the hooks) and key.
        loaded: plugins in use, sorted by name.
        failures: plugins that could not be used, sorted by name.
        disabled: plugins left out by the allow or deny list, sorted by name; they were not imported.
        notes: what is odd about plugins that are in use, a sentence each.
    """

    claims: Sequence[Claim]
    loaded: Sequence[Plugin]
    failures: Sequence[Failure]
    disabled: Sequence[Plugin]
    notes: Sequence[str] = ()

    def model(self, architecture: str) -> ModelSpec:
        """The model of an architecture.

        Raises:
            MissingPluginError: no plugin has it; the message says which package does.
        """
        spec: ModelSpec = self._one("model", architecture, "architecture", known_packages().architectures)
        return spec

    def weight_format(self, method: str) -> WeightFormatSpec:
        """How a method of quantisation stores weights.

        Raises:
            MissingPluginError: no plugin reads it; the message says which package does.
        """
        known = known_packages().weight_formats
        spec: WeightFormatSpec = self._one("weight_format", method, "quantisation method", known)
        return spec

    def input_mappers(self, architecture: str) -> Mapping[str, InputMapperSpec]:
        """Modality -> input mapper of an architecture; empty for a model of text only."""
        return self._parts("input_mapper", architecture)

    def placeholders(self, architecture: str) -> Mapping[str, PlaceholderSpec]:
        """Modality -> placeholder of an architecture; empty for a model of text only."""
        return self._parts("placeholder", architecture)

    def kernel_specs(self, device: str) -> Sequence[KernelSpec]:
        """The kernels that all plugins together bring for a device, sorted by op."""
        return tuple(self._parts("kernel", device).values())

    def devices(self) -> Sequence[DeviceSpec]:
        """All devices, sorted by name."""
        return tuple(self._of("device").values())

    def device_spec(self, name: str) -> DeviceSpec:
        """The device of a name.

        Raises:
            MissingPluginError: no plugin has it; the message says which package does.
        """
        spec: DeviceSpec = self._one("device", name, "device", known_packages().devices)
        return spec

    def probe(self, spec: DeviceSpec) -> Probe:
        """Ask a device whether it can be used. Never raises: a probe that does scores 0."""
        try:
            probe: object = spec.probe()
            if isinstance(probe, Probe):
                return probe
            reason = f"its probe returned {probe!r:.80}, expected a Probe"
        except (Exception, SystemExit) as error:
            reason = f"its probe failed: {reason_of(error)}"
        return Probe(score=0, reason=reason, next_step=self._report_to(spec))

    def select_device(self, device: str = "auto") -> tuple[DeviceSpec, int, Probe]:
        """Choose a device: ``"auto"``, a name, or ``"name:index"`` -> its spec, index and probe.

        ``"auto"`` takes the highest score, the first name among equals, index 0.

        Raises:
            MissingPluginError: no plugin has it.
            ConfigError: it cannot be used here, or its name cannot be read.
        """
        if device == "auto":
            return self._best_device()
        found = re.fullmatch(r"(?P<name>[^:]+)(:(?P<index>\d+))?", device)
        if found is None:
            raise ConfigError(f'device={device!r}: expected "auto", a name, or "name:index" such as "cpu:0"')
        spec = self.device_spec(found["name"])
        probe = self.probe(spec)
        if probe.score <= 0:
            raise ConfigError(f"device {spec.name!r} cannot be used: {_probe_text(probe)}")
        return spec, int(found["index"] or 0), probe

    def open_device(self, spec: DeviceSpec, index: int) -> Device:
        """Open a device that `select_device` chose.

        Raises:
            ConfigError: there is no such index, or a setting of the device's own cannot be.
        """
        try:
            device = spec.open(index)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if spec.torch_type not in (None, device.torch_device.partition(":")[0]):
            logger.warning(
                "device %s opened as %r, its plugin declares torch_type %r; %s",
                *(spec.name, device.torch_device, spec.torch_type, self._report_to(spec)),
            )
        return device

    def _best_device(self) -> tuple[DeviceSpec, int, Probe]:
        probed = [(self.probe(spec), spec) for spec in self.devices()]
        if not probed:
            names = ", ".join(sorted(known_packages().devices.values()))
            raise MissingPluginError(f"no device plugin: install one ({names}). {self._situation()}")
        probe, spec = min(probed, key=lambda pair: (-pair[0].score, pair[1].name))
        if probe.score <= 0:
            reasons = "; ".join(f"{spec.name}: {_probe_text(probe)}" for probe, spec in probed)
            raise ConfigError(f"no device can be used here: {reasons}")
        return spec, 0, probe

    def _report_to(self, spec: DeviceSpec) -> str:
        maker = next(claim.plugin for claim in self.claims if claim.spec is spec)
        return f"report this to the maker of {maker}"

    def _of(self, kind: str) -> dict[str, Any]:
        """Key -> spec, of one kind."""
        return {claim.key: claim.spec for claim in self.claims if claim.kind == kind}

    def _parts(self, kind: str, whole: str) -> dict[str, Any]:
        """Modality or op -> spec, of the parts of one model or device."""
        prefix = f"{whole}/"
        return {k.removeprefix(prefix): s for k, s in self._of(kind).items() if k.startswith(prefix)}

    def _one(self, kind: str, key: str, noun: str, packages: Mapping[str, str]) -> Any:
        """The spec of a key; an error that says who would provide it, and what is installed instead."""
        provided = self._of(kind)
        if key in provided:
            return provided[key]
        hint = did_you_mean(key, provided)
        if not hint and key in packages:
            hint = f"; {self._cure(packages[key])}"
        names = ", ".join(provided) or "none"
        raise MissingPluginError(
            f"no plugin provides the {noun} {key!r}{hint}. Provided {noun}s: {names}. {self._situation()}"
        )

    def _cure(self, package: str) -> str:
        """What to do to have a package's plugin: repair, enable or install it."""
        for failure in self.failures:
            if failure.plugin.distribution.split(" ")[0] == package:
                return f"{package} is installed and provides it, but its plugin failed: {failure.reason}"
        for plugin in self.disabled:
            if plugin.distribution.split(" ")[0] == package:
                return (
                    f"{package} is installed and provides it, but its plugin {plugin.name!r} is switched off "
                    f"by the allow or deny list ({ALLOW_VARIABLE}, {DENY_VARIABLE})"
                )
        return f"the package {package} does: {pip_install(package)}"

    def _situation(self) -> str:
        """What is installed, and what of it failed."""
        text = f"Plugins: {', '.join(map(str, self.loaded)) or 'none'}."
        if self.failures:
            failed = "; ".join(f"{failure.plugin}: {failure.reason}" for failure in self.failures)
            text += f" Failed: {failed}."
        if self.disabled:
            text += f" Switched off: {', '.join(map(str, self.disabled))}."
        return text


def _probe_text(probe: Probe) -> str:
    return f"{probe.reason}; {probe.next_step}" if probe.next_step else probe.reason
