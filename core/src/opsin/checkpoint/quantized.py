"""Quantised checkpoints: the tensors of each module -> its weight, as the method's plugin decodes them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from opsin.api import QuantizedWeight, StoredModule, WeightFormatSpec
from opsin.errors import CheckpointError


class QuantizedTensors:
    """Turns a checkpoint's stream of tensors into one of weights.

    Which modules are quantised is read from the tensors that are there. The lists in config.json are null in
    some checkpoints, and name other modules than those left out in others.

    Args:
        spec: how the method stores weights.
        settings: ``quantization_config``.
        keys: of all tensors that will come.
        needed: whether there has to be a quantised module.

    Attributes:
        modules: names of the quantised modules.
        as_floats: of them, those whose weights integers cannot stand for; they have become floats.

    Raises:
        CheckpointError: no tensor is one of the method's.
    """

    def __init__(
        self, spec: WeightFormatSpec, settings: Mapping[str, Any], keys: Collection[str], *, needed: bool
    ) -> None:
        self._spec, self._settings = spec, settings
        found: dict[str, set[str]] = {}
        self._place_of: dict[str, tuple[str, str]] = {}
        suffixes = sorted({*spec.suffixes, *spec.marks}, key=len, reverse=True)
        for key in keys:
            suffix = next((suffix for suffix in suffixes if key.endswith(f".{suffix}")), None)
            if suffix is not None:
                module = key[: -len(suffix) - 1]
                found.setdefault(module, set()).add(suffix)
                self._place_of[key] = module, suffix
        marks = set(spec.marks)
        self._awaited = {module: names for module, names in found.items() if names & marks}
        self.modules = sorted(self._awaited)
        self.as_floats: list[str] = []
        if needed and not self.modules:
            marks_named = " or ".join(f"NAME.{mark}" for mark in spec.marks)
            raise CheckpointError(
                f"config.json says that the weights are quantised by {spec.method}, and none of them is: "
                f"expected {marks_named}. If they are floats, remove quantization_config, or pass "
                'quantization="none"'
            )

    def decoded(
        self, tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """(key, tensor) of each: those of quantised modules as one weight, the others as they come.

        Raises:
            CheckpointError: the tensors of a module do not fit its method.
        """
        held: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors:
            module, suffix = self._place_of.get(key, ("", ""))
            if module not in self._awaited:
                yield key, tensor
                continue
            parts = held.setdefault(module, {})
            parts[suffix] = tensor
            if len(parts) == len(self._awaited[module]):
                yield f"{module}.weight", self._decode(module, held.pop(module))

    def _decode(self, module: str, tensors: Mapping[str, Tensor]) -> Tensor | QuantizedWeight:
        stored = StoredModule(name=module, tensors=tensors, settings=self._settings)
        try:
            weight = self._spec.decode(stored)
        except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in sorted(tensors.items()))
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"{module} cannot be read as {self._spec.method}: {reason}. It has {shapes}"
            ) from error
        if isinstance(weight, Tensor):
            self.as_floats.append(module)
        return weight

    def report(self) -> str:
        """One line: how many modules are quantised, and how many of them have to be floats all the same."""
        found = self.as_floats
        floats = (
            f", {len(found)} of them floats, as integers cannot stand for them ({found[0]})" if found else ""
        )
        return f"quantised by {self._spec.method}: {len(self.modules)} modules{floats}"
