"""What plugins claim: the nouns, and who wins when two claim one key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from opsin.errors import PluginConflictError, PluginError

PREFER_VARIABLE = "OPSIN_PREFER"

_PARENTS = {"input_mapper": "model", "placeholder": "model", "kernel": "device"}
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


@dataclass(frozen=True)
class Failure:
    """A plugin that is installed and cannot be used, and what it raised."""

    plugin: Plugin
    error: BaseException

    @property
    def reason(self) -> str:
        """What went wrong, in one line."""
        return reason_of(self.error)


@dataclass(frozen=True)
class Claim:
    """One spec of one plugin, and what it claims: a kind, and a key such as ``cpu`` or ``cpu/rms_norm``."""

    kind: str
    key: str
    plugin: Plugin
    spec: Any

    @property
    def text(self) -> str:
        """As it is written in ``prefer``."""
        return f"{self.kind}:{self.key}"

    @property
    def parent(self) -> str | None:
        """The whole that this is a part of, as it is written in ``prefer``; None for a whole."""
        kind = _PARENTS.get(self.kind)
        return kind and f"{kind}:{self.key.partition('/')[0]}"


def decide(
    claims: Iterable[Claim], preferences: Mapping[str, str], failures: Sequence[Failure]
) -> list[Claim]:
    """One claim for each key, whatever order they come in.

    Raises:
        PluginConflictError: two plugins claim one key and ``preferences`` do not say which to take.
        PluginError: a plugin claims a key twice, or the preferred one does not claim it.
    """
    by_key = defaultdict(list)
    for claim in sorted(claims, key=lambda claim: (claim.text, claim.plugin.name)):
        by_key[claim.text].append(claim)
    decided, conflicts = [], []
    for text, rivals in by_key.items():
        for first, second in pairwise(rivals):
            if first.plugin == second.plugin:
                raise PluginError(f"plugin {first.plugin} claims {text} twice")
        names = [claim.plugin.name for claim in rivals]
        wanted = preferences.get(text)
        if wanted is not None and wanted not in names:
            failed = "".join(f" (it failed: {f.reason})" for f in failures if f.plugin.name == wanted)
            provided = f"provided by: {', '.join(names)}"
            raise PluginError(f"prefer {text}={wanted}: this plugin does not provide it{failed}; {provided}")
        if wanted is None and len(rivals) > 1:
            wanted = preferences.get(rivals[0].parent or "")
        winner = rivals if len(rivals) == 1 else [c for c in rivals if c.plugin.name == wanted]
        if winner:
            decided += winner
        else:
            conflicts.append(rivals)
    if conflicts:
        raise PluginConflictError(_conflict_text(conflicts))
    return decided


def _conflict_text(conflicts: Sequence[Sequence[Claim]]) -> str:
    lines = [f"{rivals[0].text} ({' and '.join(str(c.plugin) for c in rivals)})" for rivals in conflicts]
    firsts = {rivals[0].text: rivals[0] for rivals in conflicts}
    # A preference for the whole decides about its parts.
    settings = {text: first.plugin.name for text, first in firsts.items() if first.parent not in firsts}
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
