"""The contract: which hooks there are, and whether a plugin keeps to them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

import pluggy

from opsin.api import (
    DeviceSpec,
    InputMapperSpec,
    KernelSpec,
    ModelSpec,
    OpName,
    PlaceholderSpec,
    WeightFormatSpec,
)
from opsin.errors import PluginError, did_you_mean
from opsin.plugins.claims import Claim, Plugin, reason_of

_MISSPELT = 0.93
"""Likeness from which on a hook's name is a misspelt one; a later version's hook has another word in it."""

DENY_VARIABLE = "OPSIN_DISABLE_PLUGINS"


@dataclass(frozen=True)
class Hook:
    """What one hook returns, and what its specs claim.

    Attributes:
        kind: as in a ``prefer`` key.
        spec: class of the specs it returns.
        key: fields of a spec that make up the key it claims.
    """

    kind: str
    spec: type[Any]
    key: tuple[str, ...]


HOOKS: Mapping[str, Hook] = {
    "opsin_register_models": Hook("model", ModelSpec, ("architecture",)),
    "opsin_register_input_mappers": Hook("input_mapper", InputMapperSpec, ("architecture", "modality")),
    "opsin_register_placeholders": Hook("placeholder", PlaceholderSpec, ("architecture", "modality")),
    "opsin_register_devices": Hook("device", DeviceSpec, ("name",)),
    "opsin_register_kernels": Hook("kernel", KernelSpec, ("device", "op")),
    "opsin_register_weight_formats": Hook("weight_format", WeightFormatSpec, ("method",)),
}
KINDS = tuple(hook.kind for hook in HOOKS.values())


def register(pm: pluggy.PluginManager, plugin: Plugin, module: object) -> list[str]:
    """Register with pluggy, checking every hook first.

    pluggy checks names and arguments too; these checks come before it to say what was meant.

    Returns:
        Hooks that this version does not know, if they are none of its own misspelt: those of a later minor
        version, without which the plugin goes on.

    Raises:
        PluginError: a misspelt hook, an unknown argument, a hook without marker, a wrapper around others.
    """
    later = []
    for name, value in inspect.getmembers(module, inspect.isroutine):
        options = pm.parse_hookimpl_opts(module, name)
        if options is None:
            if name.startswith("opsin_"):
                raise _broken(plugin, f"the function {name} is not marked with @hookimpl; mark or rename it")
            continue
        hook = options["specname"] or name
        if hook not in HOOKS:
            if options["optionalhook"]:
                continue
            hint = did_you_mean(hook, HOOKS)
            if not hook.startswith("opsin_register_") or get_close_matches(hook, HOOKS, cutoff=_MISSPELT):
                raise _broken(plugin, f"there is no hook {hook}{hint}; the hooks are {', '.join(HOOKS)}")
            later.append(hook)
            continue
        if options["wrapper"] or options["hookwrapper"]:
            raise _broken(plugin, f"{hook} is a hook wrapper; a plugin speaks for itself only")
        taken = list(inspect.signature(value).parameters)
        if taken:
            raise _broken(plugin, f"{hook} has an unknown argument {taken[0]!r}; the hook takes none")
    try:
        pm.register(module, name=plugin.name)
    except (pluggy.PluginValidationError, ValueError) as error:
        raise _broken(plugin, reason_of(error)) from error
    return later


def call_hooks(pm: pluggy.PluginManager, plugin: Plugin) -> list[tuple[str, Any]]:
    """What each of one plugin's hooks returned, unchecked."""
    return [
        (hook, impl.function())
        for hook in HOOKS
        for impl in getattr(pm.hook, hook).get_hookimpls()
        if impl.plugin_name == plugin.name
    ]


def checked_claims(plugin: Plugin, returned: Sequence[tuple[str, Any]]) -> list[Claim]:
    """What a plugin claims.

    Raises:
        PluginError: a hook returned something else than its specs, or one nobody can ask for.
    """
    claims, ops = [], get_args(OpName)
    for name, specs in returned:
        hook = HOOKS[name]
        expected = hook.spec.__name__
        if not isinstance(specs, Sequence) or isinstance(specs, (str, bytes)):
            raise _broken(plugin, f"{name} returned {_describe(specs)}, expected a sequence of {expected}")
        for spec in specs:
            if not isinstance(spec, hook.spec):
                got = _describe(spec)
                raise _broken(plugin, f"{name} returned {got} in its sequence, expected {expected}")
            key = tuple(getattr(spec, field) for field in hook.key)
            if not all(isinstance(part, str) and part for part in key):
                raise _broken(
                    plugin, f"{name} returned a spec for {key!r}, expected names that are not empty"
                )
            if isinstance(spec, KernelSpec) and spec.op not in ops:
                hint = f"{did_you_mean(spec.op, ops)}; the ops are {', '.join(ops)}"
                raise _broken(plugin, f"{name} returned a kernel for the unknown op {spec.op!r}{hint}")
            claims.append(Claim(hook.kind, "/".join(key), plugin, spec))
    return claims


def _broken(plugin: Plugin, what: str) -> PluginError:
    return PluginError(f"plugin {plugin}: {what} ({DENY_VARIABLE}={plugin.name} goes on without the plugin)")


def _describe(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.80}"
