"""Fields of settings: what their types accept, said and checked once for all of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from numbers import Integral, Real
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from opsin.errors import ConfigError

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, repr=False)
class Range:
    """Bounds of a finite number, both included: the metadata of an ``Annotated`` type."""

    least: float
    most: float = math.inf

    def __contains__(self, value: Any) -> bool:
        return bool(self.least <= value <= self.most and value != math.inf)

    def __repr__(self) -> str:
        return f"at least {self.least}" if self.most == math.inf else f"{self.least} to {self.most}"


Positive = Annotated[int, Range(1)]
NonNegative = Annotated[int, Range(0)]

_KINDS: Mapping[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str, "a string"),
    NoneType: (NoneType, "None"),
    Mapping: (Mapping, "a mapping"),
    Sequence: (Sequence, "a list"),
    Callable: (Callable, "a function"),
    Any: (object, "anything"),
}


@cache
def _hints(settings: type) -> dict[str, Any]:
    return get_type_hints(settings, include_extras=True)


@cache
def _defaults(settings: Any) -> dict[str, Any]:
    return {field.name: field.default for field in fields(settings) if field.default is not MISSING}


def check_fields(settings: object) -> None:
    """Check that the fields of a dataclass have the values that their types describe.

    Numbers of numpy become Python's, and paths become strings.

    Raises:
        ConfigError: a value is not of its field's type.
    """
    kind: Any = type(settings)
    defaults = _defaults(kind)
    for name, hint in _hints(kind).items():
        value = getattr(settings, name)
        if name in defaults and value is defaults[name]:  # of most fields; requests check some dozens each
            continue
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        expected = expectation(hint, value)
        if expected and isinstance(value, PurePath):
            value = str(value)
            expected = expectation(hint, value)
        if expected:
            raise ConfigError(f"{name}={value!r:.200}: expected {expected}")
        object.__setattr__(settings, name, value)


def expectation(hint: Any, value: Any) -> str | None:
    """What a type accepts, where the value is something else."""
    expected = []
    for member in _members(hint):
        wrong = _unlike(*member, value)
        if wrong is None:
            return None
        expected.append(wrong)
    return " or ".join(filter(None, expected))


@cache
def _members(hint: Any) -> list[tuple[Any, Any, tuple[Any, ...]]]:
    """The types of a union, or the one there is: each with its origin and arguments."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [(member, get_origin(member), get_args(member)) for member in members]


def _unlike(member: Any, origin: Any, arguments: tuple[Any, ...], value: Any) -> str | None:
    if origin is Literal:
        return None if value in arguments else ", ".join(map(repr, arguments))
    if origin is Annotated:
        fits = _unlike(arguments[0], None, (), value) is None and value in arguments[1]
        return None if fits else f"{_KINDS[arguments[0]][1]}, {arguments[1]}"
    kind, what = _KINDS.get(origin or member) or (member, f"a {member.__name__}")
    # To Python, True and False are integers, and a text is a sequence.
    odd = isinstance(value, bool) if kind in (Integral, Real) else isinstance(value, (str, bytes))
    if not isinstance(value, kind) or (odd and kind in (Integral, Real, Sequence)):
        return what
    inside: list[tuple[str, Any, Iterable[Any]]]
    if isinstance(value, Mapping) and arguments:
        inside = [("its keys", arguments[0], value), ("its values", arguments[1], value.values())]
    else:
        inside = [("each", arguments[0], value)] if kind is Sequence else []
    for which, hint, elements in inside:
        for element in elements:
            if wrong := expectation(hint, element):
                return f"{what}, {which} {wrong}"
    return None


def parameters_of(settings: type) -> list[inspect.Parameter]:
    """The fields of a dataclass as parameters of a function: named, or positional if there is no default."""
    hints = get_type_hints(settings, include_extras=True)
    parameters = []
    for f in sorted(
        fields(settings), key=lambda f: f.name not in settings.__annotations__
    ):  # a base's are last
        parameter = inspect.Parameter(
            f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hints[f.name]
        )
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if default is not MISSING:
            parameter = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=default)
        parameters.append(parameter)
    return parameters
