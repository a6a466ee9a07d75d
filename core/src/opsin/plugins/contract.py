"""The contract: which hooks there are, and whether a plugin keeps to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

import pluggy

from opsin.api import DeviceSpec, InputMapperSpec, KernelSpec, ModelSpec, OpName, PlaceholderSpec
from opsin.errors import PluginError
from opsin.plugins.claims import Claim, Key, Plugin, reason_of

DENY_VARIABLE = "OPSIN_DISABLE_PLUGINS"


@dataclass(frozen=True)
class Hook:
    """What one hook returns, and what its specs claim.

    Attributes:
        kind: as in a ``prefer`` key and in `Owner`.
        spec: class of the specs it returns.
        key: spec -> the parts of the key it claims.
    """

    kind: str
    spec: type[Any]
    key: Callable[[Any], Key]


HOOKS: Mapping[str, Hook] = {
    "opsin_register_models": Hook("model", ModelSpec, lambda s: (s.architecture,)),
    "opsin_register_input_mappers": Hook(
        "input_mapper", InputMapperSpec, lambda s: (s.architecture, s.modality)
    ),
    "opsin_register_placeholders": Hook(
        "placeholder", PlaceholderSpec, lambda s: (s.architecture, s.modality)
    ),
    "opsin_register_devices": Hook("device", DeviceSpec, lambda s: (s.name,)),
    "opsin_register_kernels": Hook("kernel", KernelSpec, lambda s: (s.device, s.op)),
}


def register(pm: pluggy.PluginManager, plugin: Plugin, module: object) -> None:
    """Register with pluggy, checking every hook first.

    pluggy checks names and arguments too; these checks come before it to say what was meant.

    Raises:
        PluginError: an unknown hook or argument, a hook without marker, a wrapper around other plugins.
    """
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
            near = get_close_matches(hook, HOOKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the hooks are {', '.join(HOOKS)}"
            raise _broken(plugin, f"there is no hook {hook}; {hint}")
        if options["wrapper"] or options["hookwrapper"]:
            raise _broken(plugin, f"{hook} is a hook wrapper; a plugin speaks for itself only")
        taken = list(inspect.signature(value).parameters)
        if taken:
            raise _broken(plugin, f"{hook} has an unknown argument {taken[0]!r}; the hook takes none")
    try:
        pm.register(module, name=plugin.name)
    except (pluggy.PluginValidationError, ValueError) as error:
        raise _broken(plugin, reason_of(error)) from error


def call_hooks(pm: pluggy.PluginManager, plugin: Plugin) -> list[tuple[str, Any]]:
    """What each of one plugin's hooks returned, unchecked."""
    callers = ((hook, getattr(pm.hook, hook)) for hook in HOOKS)
    return [
        (hook, impl.function())
        for hook, caller in callers
        for impl in caller.get_hookimpls()
        if impl.plugin_name == plugin.name
    ]


def checked_claims(plugin: Plugin, returned: Sequence[tuple[str, Any]]) -> list[Claim]:
    """What a plugin claims.

    Raises:
        PluginError: a hook returned something else than its specs, or one nobody can ask for.
    """
    claims = []
    for hook, specs in returned:
        expected = HOOKS[hook].spec
        if not isinstance(specs, Sequence) or isinstance(specs, (str, bytes)):
            raise _broken(
                plugin, f"{hook} returned {_describe(specs)}, expected a sequence of {expected.__name__}"
            )
        for spec in specs:
            if not isinstance(spec, expected):
                raise _broken(
                    plugin, f"{hook} returned {_describe(spec)} in its sequence, expected {expected.__name__}"
                )
            key = HOOKS[hook].key(spec)
            if not all(isinstance(part, str) and part for part in key):
                raise _broken(
                    plugin, f"{hook} returned a spec for {key!r}, expected names that are not empty"
                )
            if isinstance(spec, KernelSpec) and spec.op not in get_args(OpName):
                near = get_close_matches(spec.op, get_args(OpName), n=1)
                hint = f"did you mean {near[0]}?" if near else f"the ops are {', '.join(get_args(OpName))}"
                raise _broken(plugin, f"{hook} returned a kernel for the unknown op {spec.op!r}; {hint}")
            claims.append(Claim(HOOKS[hook].kind, key, plugin, spec))
    return claims


def _broken(plugin: Plugin, what: str) -> PluginError:
    return PluginError(f"plugin {plugin}: {what} ({DENY_VARIABLE}={plugin.name} goes on without the plugin)")


def _describe(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.80}"
