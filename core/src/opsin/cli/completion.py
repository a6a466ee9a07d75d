"""``opsin completion``: a script for the shell."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import App, Parameter

from opsin.cli.errors import Debug, reported

app = App(
    "completion",
    help_epilogue="""Examples:

  opsin completion bash > ~/.local/share/bash-completion/completions/opsin
  opsin completion zsh > "${fpath[1]}/_opsin"
  opsin completion fish > ~/.config/fish/completions/opsin.fish
""",
)


@app.default
@reported
def run(
    shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="Whose script to print.")],
    *,
    debug: Debug = False,
) -> None:
    """Print a script that completes commands and flags."""
    from opsin.cli import app as opsin_app

    print(opsin_app.generate_completion(prog_name="opsin", shell=shell))
