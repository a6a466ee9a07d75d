"""The vendor's kernel package torch_mlu_ops: whether it is there, in which version, and how to call it."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

from opsin_device_mlu.binding import Call, Unbindable, ways
from opsin_device_mlu.book import FUNCTIONS, OPTIONAL
from opsin_device_mlu.settings import Settings

PACKAGE = "torch_mlu_ops"
DISTRIBUTION = "torch-mlu-ops"


@dataclass(frozen=True, kw_only=True, eq=False)
class Ops:
    """What can be called. Equal to itself only: what was measured of it is kept beside it.

    Attributes:
        version: of the package; None if it is not there or does not say.
        calls: name -> the ways to call it, the likeliest first.
        refused: name -> why it is not called.
        missing: why the package as a whole is not used; empty if it is.
    """

    version: str | None = None
    calls: Mapping[str, list[Call]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""


def find_ops(settings: Settings) -> Ops:
    """Import the package, if it is wanted and there. Never raises."""
    if not settings.ops:
        return Ops(missing=f"{PACKAGE} is switched off by OPSIN_MLU_OPS=0")
    try:
        module = importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name == PACKAGE:
            return Ops(missing=f"{PACKAGE} is not installed")
        return Ops(missing=f"{PACKAGE} cannot be imported: {error}")
    except Exception as error:  # libraries built for another torch_mlu raise whatever they like
        return Ops(missing=f"{PACKAGE} cannot be imported: {type(error).__name__}: {error}")
    functions = tuple((name, getattr(module, name)) for name in FUNCTIONS if hasattr(module, name))
    return _examine(module, functions, settings.trust_signatures)


@lru_cache(maxsize=8)
def _examine(module: ModuleType, functions: tuple[tuple[str, Callable[..., Any]], ...], trust: bool) -> Ops:
    found = dict(functions)
    calls: dict[str, list[Call]] = {}
    refused: dict[str, str] = {}
    for name, known in FUNCTIONS.items():
        if name not in found:
            if name not in OPTIONAL:
                refused[name] = f"{PACKAGE} has no {name}"
            continue
        try:
            calls[name] = ways(found[name], known, trust=trust)
        except Unbindable as error:
            refused[name] = (
                f"{PACKAGE}.{name} {error}; "
                "set OPSIN_MLU_TRUST_SIGNATURES=1 if you know that the order is the known one"
            )
    return Ops(version=_version(module), calls=calls, refused=refused)


def _version(module: ModuleType) -> str | None:
    """What pip knows of the package, as the manual documents it, or what it says of itself."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = getattr(module, "__version__", None)
        return None if version is None else str(version)


def version_numbers(version: str | None) -> tuple[int, ...]:
    """``"1.3.2+pt25"`` -> (1, 3, 2); a version nobody knows counts as new."""
    found = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, found[0].split("."))) if found else (999,)
