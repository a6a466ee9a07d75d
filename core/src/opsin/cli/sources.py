"""Values of flags that are not on the command line: the environment, then the YAML file of ``--config``; and
flags that are vLLM's."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

from cyclopts import CycloptsError, Token

from opsin.cli.errors import usage
from opsin.errors import ConfigError, require_known
from opsin.vllm_names import ENGINE, Refused, Renamed

if TYPE_CHECKING:
    from cyclopts import App, Argument, ArgumentCollection

_AS_WRITTEN = ("api-key",)
"""Flags whose values are texts whatever they look like: with blanks, or with the digits of a number."""

_ALSO = {"OPSIN_API_KEY": "VLLM_API_KEY", "OPSIN_IMAGE_FETCH_TIMEOUT": "VLLM_IMAGE_FETCH_TIMEOUT"}


def from_environment(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take what the command line leaves open from the environment: ``OPSIN_MAX_MODEL_LEN`` and so on."""
    values: dict[str, Any] = {}
    for argument in arguments:
        name = _name(argument)
        variable = f"OPSIN_{name.upper().replace('-', '_')}"
        there = [known for known in (variable, _ALSO.get(variable, "")) if known in os.environ]
        if name in _AS_WRITTEN and there:  # an empty one, too: it is refused
            values[name] = [os.environ[there[0]]]
        elif text := next(filter(None, map(os.environ.get, there)), None):
            values[name] = text.split() if get_origin(argument.hint) is list else text
    _fill(arguments, values, "the environment")


def from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take what is still open from the YAML file of ``--config``: flags without dashes, or with ``_``.

    Raises:
        CycloptsError: the file cannot be read, or has a key that is no flag.
    """
    tokens = [token for argument in arguments if argument.name == "--config" for token in argument.tokens]
    if not tokens:
        return
    path = Path(tokens[-1].value)
    try:
        import yaml
    except ImportError:
        raise CycloptsError(msg="--config needs PyYAML; pip install 'opsin[serve]'") from None
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
        as_written = yaml.load(text, yaml.BaseLoader)  # texts, lists and mappings only: as safe
    except (OSError, UnicodeDecodeError) as error:
        raise CycloptsError(msg=f"--config: cannot read {path}: {type(error).__name__}") from None
    except yaml.YAMLError as error:
        raise CycloptsError(msg=f"--config: {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise CycloptsError(msg=f"--config: {path}: expected flags as keys")
    values = {str(key).replace("_", "-"): value for key, value in content.items()}
    values |= {
        name: value
        for key, value in as_written.items()
        if (name := str(key).replace("_", "-")) in _AS_WRITTEN and values.get(name) is not None
    }
    known = {_name(argument) for argument in arguments} - {"config"}
    with usage():
        require_known(f"--config: {path}", values, known, ConfigError)
    _fill(arguments, values, str(path))


def _name(argument: Argument) -> str:
    return argument.name.lstrip("-").lower()


def _fill(arguments: ArgumentCollection, values: Mapping[str, Any], source: str) -> None:
    for argument in arguments:
        value = values.get(_name(argument))
        if value is None or argument.tokens:
            continue
        repeated = isinstance(value, list) and argument.token_count()[1]
        for index, item in enumerate(value if repeated else [value]):
            text = item if isinstance(item, str) else json.dumps(item, default=str)
            argument.append(Token(keyword=argument.name, value=text, source=source, index=index))


# ---- vLLM's flags --------------------------------------------------------------------------------

_ALONE = re.compile(
    r"(no|enable|disable|enforce|use|skip|fully|async|calculate|interleave|aggregate|ray_workers)_|"
    r"(language_model|mm_encoder)_only$"
)
"""Names of vLLM's flags that stand alone; all others are followed by a value."""


def without_vllm_flags(arguments: Sequence[str], own: Collection[str]) -> list[str]:
    """A command line without vLLM's flags: those that ask for nothing go, with a line that says so.

    Args:
        arguments: after the command's name.
        own: flags of the command, which are left alone.

    Raises:
        CycloptsError: a flag asks for what opsin has not.
    """
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token == "--":
            return [*kept, token, *rest]
        flag, equals, text = token.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        entry = ENGINE.get(name.removeprefix("no_"), ENGINE.get(name))
        if not flag.startswith("--") or flag.lower().replace("_", "-") in own or entry is None:
            kept.append(token)
            continue
        value: Any = not name.startswith("no_")
        if equals or (not _ALONE.match(name) and rest and not rest[0].startswith("--")):
            value = _scalar(text if equals else rest.pop(0))
        if isinstance(entry, Renamed):
            converted = entry.convert(value)
            kept += [] if converted is None else [f"--{entry.to.replace('_', '-')}", str(converted)]
        elif isinstance(entry, Refused):
            if not any(type(value) is type(n) and value == n for n in entry.neutral):
                raise CycloptsError(msg=f"{flag} {value} is not supported: {entry.why}")
        else:
            print(f"opsin: {flag} has no effect: {entry.why}", file=sys.stderr)
    return kept


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def misspelt_variables(own: Collection[str]) -> Iterator[str]:
    """What to say of variables of the environment that look like a flag's and are none."""
    known = {f"OPSIN_{flag.removeprefix('--').upper().replace('-', '_')}": flag for flag in own}
    for variable in os.environ:
        if variable.startswith("OPSIN_") and variable not in known:
            for near in get_close_matches(variable, known, n=1, cutoff=0.9):
                yield f"{variable} is read by nobody; did you mean {near} ({known[near]})?"
