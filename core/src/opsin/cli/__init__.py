"""The command line: ``opsin`` ``serve``, ``chat``, ``generate``, ``batch``, ``bench``, ``plugins``,
``doctor``, ``quantize``, ``new-plugin``, ``completion``.

Each command is a module with an `app`, imported when it is used; whatever is heavy is imported inside of its
function, so that help comes at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from cyclopts import App, CycloptsError, Group, Parameter

import opsin
from opsin.cli.printing import PlainHelp
from opsin.cli.sources import from_environment, from_file, misspelt_variables, without_vllm_flags

app = App(
    "opsin",
    help="Run vision-language models. Model families and devices are plugins.",
    version=f"opsin {opsin.__version__}",
    help_flags=("--help", "-h"),
    help_format="plaintext",
    help_formatter=PlainHelp(),
    default_parameter=Parameter(
        negative_bool=(), negative_iterable=(), allow_repeating=True, show_env_var=False
    ),
    group_arguments=Group.create_ordered("Arguments"),
    group_parameters=Group.create_ordered("Options"),
    config=(from_environment, from_file),
    suppress_keyboard_interrupt=False,
)
_COMMANDS = {
    "serve": "Serve a model over HTTP, with OpenAI's API.",
    "chat": "Talk with a model about pictures, in the terminal.",
    "generate": "Ask a model about pictures and videos.",
    "batch": "Answer many requests, from a file or a folder into a file.",
    "bench": "Measure how fast a model or a server is.",
    "plugins": "Show the installed plugins, and who provides what.",
    "doctor": "Say what works on this machine, and what to do about the rest.",
    "quantize": "Round a checkpoint's weights once, to 8 or 4 bits.",
    "new-plugin": "Write the package of a new model or device plugin.",
    "completion": "Print a script that completes commands and flags in a shell.",
}
_WITH_ENGINE = ("serve", "chat", "generate", "batch")
"""Commands that load a model: vLLM's flags of an engine are known there."""

for position, (name, text) in enumerate(_COMMANDS.items()):
    app.command(f"opsin.cli.{name.replace('-', '_')}:app", name=name, help=text, sort_key=position)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line; ends the process, with status 2 for one that makes no sense."""
    # The first process of a container gets no SIGTERM unless it asks for it, and imports take seconds.
    signal.signal(signal.SIGTERM, _terminated)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "-" in arguments and "--" not in arguments:  # standard input: cyclopts would take it for an option
        arguments.remove("-")
        arguments += ["--", "-"]
    try:
        if arguments and arguments[0] in _WITH_ENGINE:
            own = {
                name
                for argument in app[arguments[0]].assemble_argument_collection()
                for name in argument.names
            }
            arguments = [arguments[0], *without_vllm_flags(arguments[1:], own)]
            for said in misspelt_variables(own):
                print(f"opsin: {said}", file=sys.stderr)
        status = app(arguments, print_error=False, exit_on_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        command = " ".join(["opsin", *app.parse_commands(arguments)[0]])
        print(f"opsin: {' '.join(str(error).split())}", file=sys.stderr)
        print(f"Usage: {command} --help shows what is possible", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130  # 128 + SIGINT, as shells have it
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status if arguments else 2)  # without a command, help is all there is


def _terminated(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)  # as shells have it
