"""What a command does when it fails: one clear line and an exit status."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

from cyclopts import CycloptsError, Parameter

from opsin.errors import ConfigError, OpsinError

Debug = Annotated[bool, Parameter(negative=(), help="Show the traceback of an error.")]
"""A command's option: every command has it."""


@contextmanager
def usage() -> Iterator[None]:
    """Settings that cannot be are the command line's fault: exit status 2."""
    try:
        yield
    except ConfigError as error:
        raise CycloptsError(msg=str(error)) from error


def reported(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """The command with its errors as one line on stderr and exit status 1; --debug adds the traceback."""

    @functools.wraps(command)
    def run(*arguments: Any, debug: bool = False, **options: Any) -> int | None:
        try:
            return command(*arguments, debug=debug, **options)
        except (CycloptsError, BrokenPipeError):  # `main` knows what to do
            raise
        except OpsinError as error:
            fail(str(error), debug)
        except Exception as error:
            hint = "" if debug else " (--debug shows where)"
            fail(f"unexpected {type(error).__name__}: {error}{hint}", debug)

    return run


def fail(message: str, debug: bool) -> NoReturn:
    """End the process with one line on stderr; with ``debug`` the traceback goes before it."""
    if debug:
        traceback.print_exc()
    print(f"opsin: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
