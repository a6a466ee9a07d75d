"""What a command does when it fails: one clear line and an exit status."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from opsin.errors import OpsinError

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
"""A command's option: every command has it."""

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells have it."""


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its errors as one line on stderr and exit status 1; --debug adds the traceback."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **options: Any) -> None:
        try:
            command(*args, debug=debug, **options)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has seen enough. Python would complain when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OpsinError as error:
            fail(str(error), debug)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            hint = "" if debug else " (--debug shows where)"
            fail(f"unexpected {type(error).__name__}: {error}{hint}", debug)

    return run


def fail(message: str, debug: bool) -> None:
    """End the process with one line on stderr; with ``debug`` the traceback goes before it."""
    if debug:
        traceback.print_exc()
    print(f"opsin: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
