"""Flags made of dataclasses: a field is a flag, its docstring the help, the docstring's section the topic."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache, partial, wraps
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token

from opsin.fields import expectation, parameters_of

T = TypeVar("T")

PYTHON_ONLY = "Attributes"
"""Section of a docstring whose fields are for Python only."""

SHORT = {"quantization": "-q", "tensor_parallel_size": "-tp"}
"""Short names of flags, which are vLLM's."""

_topic = cache(Group.create_ordered)


def takes(*settings: type) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a command the flags of these dataclasses. Its ``**settings`` has those that were given."""

    def decorate(command: Callable[..., T]) -> Callable[..., T]:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        flags = list(itertools.chain(*map(_flags, settings)))
        required = [flag for flag in flags if flag.default is flag.empty]
        ordered = [*required, *own, *(flag for flag in flags if flag not in required)]
        signature = inspect.Signature(
            [
                flag.replace(kind=flag.POSITIONAL_ONLY) if flag.kind is flag.POSITIONAL_OR_KEYWORD else flag
                for flag in ordered
            ]
        )

        @wraps(command)
        def run(*arguments: Any, **given: Any) -> T:
            return command(**signature.bind(*arguments, **given).arguments)

        vars(run)["__signature__"] = signature
        return run

    return decorate


def build(cls: type[T], given: Mapping[str, Any]) -> T:
    """A dataclass with those of its settings that were given.

    Raises:
        ConfigError: a setting cannot be, or two contradict each other.
    """
    hints = get_type_hints(cls)
    nested = {name: build(hint, given) for name, hint in hints.items() if _is_settings(hint)}
    return cls(**{name: given[name] for name in hints if name in given}, **nested)


def _flags(cls: type) -> Iterator[inspect.Parameter]:
    parameters = {parameter.name: parameter for parameter in parameters_of(cls)}
    for topic, name, text in described(cls):
        if topic != PYTHON_ONLY:
            yield _flag(parameters[name], topic, text)
    for parameter in parameters.values():
        if _is_settings(parameter.annotation):
            yield from _flags(parameter.annotation)


def _is_settings(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def described(cls: type) -> Iterator[tuple[str, str, str]]:
    """Topic, name and help of the fields that the docstrings of a dataclass and its bases describe."""
    for owner in filter(is_dataclass, cls.__mro__):
        text = inspect.cleandoc(owner.__doc__ or "")
        for section in re.split(r"\n\n(?=[^\n]+:\n    \w)", text)[1:]:
            topic, _, entries = section.partition(":\n")
            for entry in re.split(r"^    (?=\w)", entries, flags=re.M)[1:]:
                name, _, help_text = entry.partition(": ")
                yield topic, name, " ".join(help_text.replace("`", "").split())


def _flag(parameter: inspect.Parameter, topic: str, text: str) -> inspect.Parameter:
    hint = parameter.annotation
    members = [get_origin(member) or member for member in (hint, *get_args(hint))]
    elements = [arg for member in (hint, *get_args(hint)) for arg in get_args(member)]
    more: dict[str, Any] = {"negative": (), "validator": partial(_check, hint)}
    if Mapping in members:
        # The values of several such flags come together, as they do for a list.
        hint = dict[str, Any]
        more |= {"converter": _mapping, "n_tokens": -1, "json_dict": False}
    elif Sequence in members:
        hint = list[float] if float in elements else list[str]
    elif bool in members and parameter.default is not False:
        more["negative"] = f"--no-{parameter.name.replace('_', '-')}"
    named = parameter.kind is parameter.KEYWORD_ONLY
    if parameter.name in SHORT:
        more["alias"] = SHORT[parameter.name]
    if named:
        more |= {"group": _topic(topic), "allow_leading_hyphen": bool not in members}
    flag = Parameter(help=text[:1].upper() + text[1:], **more)
    hint = hint | None if parameter.default is None else hint
    return parameter.replace(annotation=Annotated[hint, flag])


def _check(hint: Any, _: Any, value: Any) -> None:
    # What is in a mapping is for the settings to judge: they take more forms than they keep.
    if not isinstance(value, Mapping) and (expected := expectation(hint, value)):
        raise ValueError(f"Expected {expected}.")


def _mapping(hint: Any, given: Sequence[Token] | Mapping[str, Any]) -> dict[str, Any]:
    """``image=2,video=1`` or JSON, repeated or not; or ``--flag.image 2``. Values are JSON where they can.

    Raises:
        ValueError: the text is neither.
    """
    if isinstance(given, Mapping):
        dotted = given.items()
        return {k: _mapping(hint, v) if isinstance(v, Mapping) else _value(v[-1].value) for k, v in dotted}
    merged: dict[str, Any] = {}
    for token in given:
        if token.value.lstrip().startswith("{"):
            try:
                merged |= json.loads(token.value)
            except ValueError as error:
                raise ValueError(f"not JSON: {error}") from None
            continue
        for pair in filter(str.strip, token.value.split(",")):
            key, equals, value = pair.partition("=")
            if not equals or not key.strip():
                raise ValueError(f"{pair!r}: expected name=value, name=value,... or a JSON object")
            merged[key.strip()] = _value(value)
    return merged


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()
