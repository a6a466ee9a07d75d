"""The syntaxes in which ``opsin serve`` takes its settings: dotted flags, ``k=v`` or JSON, a YAML file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

MAPPINGS = ("limit-mm-per-prompt", "mm-processor-kwargs")
"""Options that hold a mapping and can be written with a dot: ``--limit-mm-per-prompt.image 2``."""


class ServeCommand(typer.core.TyperCommand):
    """Rewrites arguments before they are parsed; shows its help by topic, every flag in full."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept vLLM's spellings, too."""
        return super().parse_args(ctx, spelled(args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Plain text: in a terminal of 80 columns rich's tables would cut the longer flags off."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        topics: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                topics.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for topic, records in topics.items():
            with formatter.section(topic):
                formatter.write_dl(records)
        self.format_epilog(ctx, formatter)


def spelled(args: Sequence[str]) -> list[str]:
    """``--max_model_len`` -> ``--max-model-len``, ``--limit-mm-per-prompt.image 2`` -> ``... image=2``."""
    result: list[str] = []
    rest = list(args)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            result.append(argument)
            if argument == "--":
                return result + rest
            continue
        flag, equals, value = argument[2:].partition("=")
        name, dot, key = flag.partition(".")
        name = name.replace("_", "-")
        if dot and name in MAPPINGS and key:
            if not equals:
                if not rest:
                    raise typer.BadParameter("expected a value", param_hint=f"--{flag}")
                value = rest.pop(0)
            result += [f"--{name}", f"{key}={value}"]
        else:
            result.append(f"--{name}{dot}{key}{equals}{value}")
    return result


def mapping(flag: str, values: Iterable[str]) -> dict[str, Any]:
    """``image=2,video=1`` or JSON, also several times, -> one dict; values are read as JSON where they are.

    Raises:
        typer.BadParameter: one of the values is neither.
    """
    merged: dict[str, Any] = {}
    for text in values:
        if text.lstrip().startswith("{"):
            try:
                given = json.loads(text)
            except ValueError as error:
                raise typer.BadParameter(f"not JSON: {error}", param_hint=flag) from None
        else:
            given = dict(_pair(flag, piece) for piece in text.split(",") if piece.strip())
        merged |= given
    return merged


def limits_of_media(values: Iterable[str]) -> dict[str, int]:
    """The value of ``--limit-mm-per-prompt``.

    Raises:
        typer.BadParameter: a limit is no number.
    """
    flag = "--limit-mm-per-prompt"
    limits: dict[str, int] = {}
    for modality, limit in mapping(flag, values).items():
        if isinstance(limit, dict):  # vLLM's newer form, with sizes for its profiling
            limit = limit.get("count")
        if type(limit) is not int or limit < 0:
            raise typer.BadParameter(f"{modality}: expected a number, 0 or more", param_hint=flag)
        limits[modality] = limit
    return limits


def read_config(path: Path, names: Mapping[str, bool]) -> dict[str, Any]:
    """A YAML file of flags -> defaults for the command's parameters.

    Args:
        path: the file. Keys are flags without dashes, with ``-`` or ``_``; ``model`` is the argument.
        names: parameter name -> whether it takes several values.

    Raises:
        typer.BadParameter: the file cannot be read, or has a key that is no flag.
    """
    hint = "--config"
    try:
        import yaml
    except ImportError:
        raise typer.BadParameter("needs PyYAML; pip install 'opsin[serve]'", param_hint=hint) from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {type(error).__name__}", param_hint=hint) from None
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{path} is not YAML: {error}", param_hint=hint) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path}: expected flags as keys", param_hint=hint)
    defaults: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names or name == "config":
            close = get_close_matches(name, names, n=1)
            advice = f" (did you mean {close[0].replace('_', '-')!r}?)" if close else ""
            raise typer.BadParameter(f"{path}: unknown flag {str(key)!r}{advice}", param_hint=hint)
        if isinstance(value, dict):
            value = json.dumps(value)
        if names[name] and not isinstance(value, list):
            value = [value]
        defaults[name] = value
    return defaults


def _pair(flag: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise typer.BadParameter(
            f"{text!r}: expected name=value, name=value,... or a JSON object", param_hint=flag
        )
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        return key.strip(), value.strip()
