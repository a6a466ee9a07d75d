"""The command line: ``opsin serve``, ``opsin generate``, ``opsin plugins``, ``opsin doctor``.

Each command is a module with a function `run`; whatever is heavy is imported inside of it, so that help comes
at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import opsin
from opsin.cli import doctor, generate, plugins, serve
from opsin.cli.errors import reported
from opsin.cli.serve_arguments import ServeCommand

app = typer.Typer(
    name="opsin",
    help="Run vision-language models. Model families and devices are plugins.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(
    "serve",
    epilog=serve.EXAMPLES,
    cls=ServeCommand,
    context_settings={"auto_envvar_prefix": "OPSIN", "max_content_width": 110},
)(reported(serve.run))
app.command("generate", epilog=generate.EXAMPLES)(reported(generate.run))
app.command("plugins")(reported(plugins.run))
app.command("doctor")(reported(doctor.run))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"opsin {opsin.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command's name."""


def main() -> None:
    """Run a command line; ends the process."""
    try:
        app(prog_name="opsin")
    except KeyboardInterrupt:
        sys.exit(130)
