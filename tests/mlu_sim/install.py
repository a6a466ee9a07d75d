"""Putting the simulated card into this process."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.mlu_sim import cncl, dispatch, torch_mlu_module
from tests.mlu_sim.card import CARD
from tests.mlu_sim.names import PRINTED, renamed
from tests.mlu_sim.switches import SWITCHES

GENERATIONS = {"1.3.2": "tests.mlu_sim.ops_1_3", "1.8.0": "tests.mlu_sim.ops_1_8"}
"""Version of the fake torch_mlu_ops -> its module. ``none``: not installed."""


class _Finder:
    """Finds ``torch_mlu`` and ``torch_mlu_ops`` as an installation would."""

    def __init__(self) -> None:
        self.ops: str | None = None
        self.backend: ModuleType | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torch_mlu" or (name == "torch_mlu_ops" and self.ops is not None):
            return importlib.machinery.ModuleSpec(name, self)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        if spec.name == "torch_mlu_ops":
            assert self.ops is not None
            return _copy(importlib.import_module(GENERATIONS[self.ops]))
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "torch_mlu":
            if CARD.fault is not None:
                raise CARD.fault
            if self.backend is None:
                self.backend = _register_backend()
            module.mlu = self.backend  # type: ignore[attr-defined]
            module.__version__ = torch_mlu_module.VERSION  # type: ignore[attr-defined]


_finder = _Finder()
_libraries: list[Any] = []


def install(ops: str = "1.3.2") -> None:
    """Make ``import torch_mlu`` work here; like the real one, it is not imported by torch itself."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)  # type: ignore[arg-type]
    use_ops(ops)


def installed() -> bool:
    """Whether this process has the simulated card."""
    return _finder in sys.meta_path


def use_ops(version: str) -> None:
    """Have this generation of torch_mlu_ops installed from now on, or ``"none"``."""
    if version != "none" and version not in GENERATIONS:
        raise ValueError(f"torch_mlu_ops {version} is not simulated: none, {', '.join(GENERATIONS)} are")
    wanted = None if version == "none" else version
    if wanted == _finder.ops and _untouched(sys.modules.get("torch_mlu_ops")):
        return  # what is known of its kernels holds
    sys.modules.pop("torch_mlu_ops", None)
    _finder.ops = wanted


def _untouched(module: ModuleType | None) -> bool:
    """Whether a package is as it was made, and made under the reading of this moment."""
    if module is None or not hasattr(module, "_made"):
        return False
    functions, reading = module._made
    return reading == replace(SWITCHES) and all(getattr(module, n, None) is f for n, f in functions.items())


def _copy(module: ModuleType) -> ModuleType:
    """A module object of its own, so that a test can break one kernel of it."""
    copied = ModuleType("torch_mlu_ops")
    copied.__dict__.update(
        {k: v for k, v in vars(module).items() if not k.startswith("__") or k == "__version__"}
    )
    for name in PRINTED:
        setattr(copied, name, renamed(name, getattr(module, name), SWITCHES.names))
    made = {name: getattr(copied, name) for name in PRINTED}
    copied._made = made, replace(SWITCHES)  # type: ignore[attr-defined]
    return copied


def _register_backend() -> ModuleType:
    backend = torch_mlu_module.make()
    _setup_privateuseone_for_python_backend("mlu", backend_module=backend)
    library = torch.library.Library("_", "IMPL")
    library.fallback(dispatch.fallback, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("convolution_overrideable", dispatch.convolution, "PrivateUse1")
    _libraries.extend((library, aten))
    cncl.register()
    return backend
