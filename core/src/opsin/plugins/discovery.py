"""Finding the installed plugins, importing them under guard, and checking the user's lists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from importlib.metadata import EntryPoint
from itertools import groupby
from typing import cast

import pluggy

from opsin import hookspecs
from opsin.api import API_MAJOR, ENTRY_POINT_GROUP
from opsin.errors import ConfigError, MissingPluginError, PluginConflictError, PluginError, did_you_mean
from opsin.plugins.claims import PREFER_VARIABLE, Claim, Failure, Plugin, decide
from opsin.plugins.contract import DENY_VARIABLE, KINDS, call_hooks, checked_claims, register
from opsin.plugins.index import ALLOW_VARIABLE, Plugins


def load_plugins(
    *,
    allow: Sequence[str] | None = None,
    deny: Sequence[str] = (),
    prefer: Mapping[str, str] | None = None,
    entry_points: Iterable[EntryPoint] | None = None,
    extra: Mapping[str, object] | None = None,
) -> Plugins:
    """Find, check and index the installed plugins. Keeps no global state.

    Args:
        allow: plugins to use; each must be installed and work. None: those in the environment variable
            OPSIN_PLUGINS (names separated by commas), or all.
        deny: plugins to leave out, besides those in OPSIN_DISABLE_PLUGINS. They are not imported.
        prefer: who wins when two plugins claim one key: ``"model:ARCHITECTURE"``, ``"device:NAME"``,
            ``"input_mapper:ARCHITECTURE/MODALITY"``, ``"placeholder:ARCHITECTURE/MODALITY"`` or
            ``"kernel:DEVICE/OP"`` -> plugin name. A preference for a model or a device also decides about its
            parts. Overrides OPSIN_PREFER (``key=plugin``, separated by commas).
        entry_points: candidates instead of those of the installed packages.
        extra: further plugins by name: modules or objects whose functions carry ``hookimpl``.

    Raises:
        PluginError: a plugin breaks the contract, or one that ``allow`` names does not work.
        MissingPluginError: ``allow`` names a plugin that is not installed.
        PluginConflictError: two plugins claim one key and ``prefer`` does not decide.
        ConfigError: a preference cannot be read, or a name is both allowed and denied.
    """
    if allow is None:
        allow = _names_in(ALLOW_VARIABLE) or None
    denied = {*deny, *_names_in(DENY_VARIABLE)}
    preferences = _checked_preferences({**_preferences_in_environment(), **(prefer or {})})

    candidates = _candidates(_installed() if entry_points is None else entry_points, extra or {})
    _check_allowed(allow or (), denied, {plugin.name for plugin in candidates})
    chosen = {
        plugin: source
        for plugin, source in candidates.items()
        if plugin.name not in denied and (allow is None or plugin.name in allow)
    }
    _check_names(chosen)

    claims, failures = _load(chosen)
    for failure in failures:
        if allow is not None and failure.plugin.name in allow:
            message = f"plugin {failure.plugin} was asked for and failed: {failure.reason}"
            raise PluginError(message) from failure.error
    decided = decide(claims, preferences, failures)
    failed = {failure.plugin for failure in failures}
    return Plugins(
        claims=tuple(sorted(decided, key=lambda claim: (KINDS.index(claim.kind), claim.key))),
        loaded=tuple(plugin for plugin in chosen if plugin not in failed),
        failures=tuple(failures),
        disabled=tuple(plugin for plugin in candidates if plugin not in chosen),
    )


def _load(chosen: Mapping[Plugin, object]) -> tuple[list[Claim], list[Failure]]:
    """Import the plugins and collect their claims, checked against the contract."""
    pm = pluggy.PluginManager(hookspecs.PROJECT)
    pm.add_hookspecs(hookspecs)
    claims: list[Claim] = []
    failures: list[Failure] = []
    for plugin, source in chosen.items():
        try:
            module = _import(source)
        except (Exception, SystemExit) as error:
            failures.append(Failure(plugin, error))
            continue
        register(pm, plugin, module)
        try:
            returned = call_hooks(pm, plugin)
        except (Exception, SystemExit) as error:
            failures.append(Failure(plugin, error))
            continue
        claims += checked_claims(plugin, returned)
    pm.check_pending()
    return claims, failures


def _installed() -> list[EntryPoint]:
    found = metadata.entry_points()
    groups = [group for group in found.groups if _major_of(group) is not None]
    return [entry for group in groups for entry in found.select(group=group)]


def _major_of(group: str) -> int | None:
    """The API major in an entry-point group's name; None for a group that is not ours."""
    found = re.fullmatch(r"opsin\.v(\d+)", group)
    return int(found[1]) if found else None


def _candidates(entries: Iterable[EntryPoint], extra: Mapping[str, object]) -> dict[Plugin, object]:
    """All plugins with the entry point or object they come from, sorted.

    Of a package that serves several API majors under one name, the entry point for ours.
    """
    found: dict[Plugin, object] = {}
    for entry in sorted(entries, key=lambda entry: entry.group == ENTRY_POINT_GROUP):
        if _major_of(entry.group) is not None:
            dist = entry.dist
            origin = f"{dist.name} {dist.version}" if dist is not None else f"entry point {entry.value}"
            found[Plugin(name=entry.name, distribution=origin)] = entry
    found.update({Plugin(name=name, distribution="in process"): source for name, source in extra.items()})
    return dict(sorted(found.items(), key=lambda pair: (pair[0].name, pair[0].distribution)))


def _check_allowed(allow: Sequence[str], denied: set[str], installed: set[str]) -> None:
    for name in allow:
        if name in denied:
            raise ConfigError(
                f"plugin {name!r} is in the allow list and in the deny list; take it out of one"
            )
        if name not in installed:
            known = sorted(installed)
            raise MissingPluginError(
                f"plugin {name!r} was asked for and is not installed{did_you_mean(name, known)}. "
                f"Installed plugins: {', '.join(known) or 'none'}"
            )


def _check_names(plugins: Iterable[Plugin]) -> None:
    for name, group in groupby(plugins, key=lambda plugin: plugin.name):
        origins = [plugin.distribution for plugin in group]
        if len(origins) > 1:
            raise PluginConflictError(
                f"{len(origins)} plugins have the name {name!r}: {' and '.join(origins)}; "
                f"uninstall one, or leave both out with {DENY_VARIABLE}={name}"
            )


def _import(source: object) -> object:
    if not isinstance(source, EntryPoint):
        return source
    if source.group != ENTRY_POINT_GROUP:
        major = _major_of(source.group)
        raise PluginError(
            f"made for plugin API {major} (entry-point group {source.group}), this opsin has {API_MAJOR}; "
            f"upgrade {'opsin' if major is not None and major > API_MAJOR else 'the plugin'}"
        )
    return cast(object, source.load())


def _checked_preferences(preferences: Mapping[str, str]) -> Mapping[str, str]:
    for key, plugin in preferences.items():
        kind, _, rest = key.partition(":")
        if kind not in KINDS or not rest or not plugin:
            raise ConfigError(
                f"prefer {key}={plugin}: expected KIND:KEY=PLUGIN with KIND one of {', '.join(KINDS)}, "
                "such as device:cpu=device_cpu"
            )
    return preferences


def _names_in(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]


def _preferences_in_environment() -> dict[str, str]:
    pairs = (entry.partition("=") for entry in _names_in(PREFER_VARIABLE))
    return {key.strip(): plugin.strip() for key, _, plugin in pairs}
