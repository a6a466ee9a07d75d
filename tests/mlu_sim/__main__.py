"""Run a module beside a simulated MLU370: ``python -m tests.mlu_sim [--ops VERSION] -m MODULE ...``."""

from __future__ import annotations

import runpy
import sys

from tests.mlu_sim import CARD, SWITCHES, install


def main(arguments: list[str]) -> None:
    """Install the card and run the module."""
    ops = "1.3.2"
    while arguments and arguments[0] in ("--ops", "--memory", "--devices", "--switch"):
        name, value, *arguments = arguments
        if name == "--ops":
            ops = value
        elif name == "--switch":
            SWITCHES.set(**{value.partition("=")[0]: value.partition("=")[2]})
        elif name == "--memory":
            CARD.total_memory = int(value)
        else:
            CARD.num_devices = int(value)
    if len(arguments) < 2 or arguments[0] != "-m":
        sys.exit(
            "usage: python -m tests.mlu_sim [--ops VERSION] [--memory BYTES] [--devices N] "
            "[--switch NAME=VALUE] ... -m MODULE ..."
        )
    install(ops)
    module = arguments[1]
    sys.argv = arguments[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


main(sys.argv[1:])
