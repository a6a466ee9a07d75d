"""What plugins claim: the nouns, and who wins when two claim one key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsin.errors import PluginConflictError, PluginError

PREFER_VARIABLE = "OPSIN_PREFER"

Key = tuple[str, ...]
"""The parts of a key: ``("cpu",)``, or ``("cpu", "rms_norm")``."""

PREFER_PARENT = {"input_mapper": "model", "placeholder": "model", "kernel": "device"}
"""A preference for a whole model or device also decides about its parts, unless they have their own."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """An installed plugin.

    Attributes:
        name: of its entry point.
        distribution: name and version of the package it came in, or where else it came from.
    """

    name: str
    distribution: str

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution})"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A plugin that is installed and cannot be used.

    Attributes:
        plugin: which.
        reason: one line.
        error: what was raised, if something was.
    """

    plugin: Plugin
    reason: str
    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who provides what: one row of ``opsin plugins``."""

    kind: str
    key: str
    plugin: Plugin


@dataclass(frozen=True)
class Claim:
    """One spec of one plugin, and the key it claims."""

    kind: str
    key: Key
    plugin: Plugin
    spec: Any

    @property
    def text(self) -> str:
        """As it is written in ``prefer``."""
        return f"{self.kind}:{'/'.join(self.key)}"


def decide(
    claims: Iterable[Claim], preferences: Mapping[str, str], failures: Sequence[Failure]
) -> list[Claim]:
    """One claim for each key, the same whatever order they come in.

    Raises:
        PluginConflictError: two plugins claim one key and ``preferences`` do not say which to take.
        PluginError: a plugin claims a key twice, or the preferred one does not claim it.
    """
    by_key = defaultdict(list)
    for claim in claims:
        by_key[claim.text].append(claim)
    decided, conflicts = [], []
    for text, rivals in sorted(by_key.items()):
        names = [claim.plugin.name for claim in rivals]
        if len(set(names)) < len(names):
            raise PluginError(f"plugin {rivals[0].plugin} claims {text} twice")
        wanted = preferences.get(text)
        if wanted is not None and wanted not in names:
            failed = "".join(f" (it failed: {f.reason})" for f in failures if f.plugin.name == wanted)
            raise PluginError(
                f"{text} is to come from the plugin {wanted!r}{failed}, which does not provide it; "
                f"provided by: {', '.join(sorted(names))}"
            )
        if wanted is None and len(rivals) > 1:
            parent = PREFER_PARENT.get(rivals[0].kind)
            wanted = preferences.get(f"{parent}:{rivals[0].key[0]}")
        winner = rivals if len(rivals) == 1 else [c for c in rivals if c.plugin.name == wanted]
        if winner:
            decided += winner
        else:
            conflicts.append(sorted(rivals, key=lambda claim: claim.plugin.name))
    if conflicts:
        raise PluginConflictError(_conflict_text(conflicts))
    return decided


def _conflict_text(conflicts: Sequence[Sequence[Claim]]) -> str:
    lines = [f"{rivals[0].text} ({' and '.join(str(c.plugin) for c in rivals)})" for rivals in conflicts]
    settings = {rivals[0].text: rivals[0].plugin.name for rivals in conflicts}
    # What a parent's preference decides need not be said again.
    for rivals in conflicts:
        if f"{PREFER_PARENT.get(rivals[0].kind)}:{rivals[0].key[0]}" in settings:
            del settings[rivals[0].text]
    variable = ",".join(f"{key}={name}" for key, name in settings.items())
    return (
        f"plugins claim the same: {'; '.join(lines)}. Uninstall one, or say which one to use, for example "
        f"prefer={settings!r} or {PREFER_VARIABLE}={variable}"
    )


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, PluginError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
