"""Virtual environments of the peers, in .peers/: each has versions of its own, none is opsin's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".peers"
LOGS = PEERS / "logs"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What to install, and how.

    Attributes:
        requirements: for pip. ``{torch}`` is opsin's own version of it.
        options: more for pip.
        variables: of the installation.
        takes: for people.
    """

    requirements: Sequence[str]
    options: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    takes: str


ENVIRONMENTS: Mapping[str, Environment] = {
    "openvino": Environment(
        # optimum-intel 2.2 exports Qwen2-VL with transformers up to 5.0 only. Without torchvision: of PyPI's
        # builds for Linux none fits a torch without CUDA, and pictures are processed by OpenVINO itself.
        requirements=(
            "openvino-genai==2026.4.1.0",
            "optimum-intel==2.2.0",
            "transformers==5.0.0",
            "{torch}",
            "numpy",
            "pillow",
            "tqdm",
        ),
        takes="two minutes",
    ),
    "llamacpp": Environment(
        requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy", "pillow", "tqdm"),
        options=("--no-binary", "llama-cpp-python"),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
        takes="a quarter of an hour; it is compiled for this processor",
    ),
}


class NotToBeHadError(Exception):
    """A peer cannot be installed or prepared; the message says why, in one line."""


def python_of(peer: str) -> str:
    """The interpreter that has this peer's packages; installs them the first time.

    Raises:
        NotToBeHadError: pip failed.
    """
    if peer not in ENVIRONMENTS:
        return sys.executable
    wanted = ENVIRONMENTS[peer]
    folder = PEERS / peer
    python = str(folder / "bin" / "python")
    requirements = [text.format(torch=_torch()) for text in wanted.requirements]
    stamp = folder / "installed.txt"
    recipe = "\n".join([*requirements, *wanted.options, *(f"{k}={v}" for k, v in wanted.variables.items())])
    if stamp.exists() and stamp.read_text() == recipe:
        return python
    print(f"{peer}: installing into {folder} (takes {wanted.takes})", file=sys.stderr, flush=True)
    try:
        venv.create(folder, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotToBeHadError(f"no virtual environment could be made: {error}") from None
    extra = shlex.split(os.environ.get("PIP_EXTRA", ""))
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", *wanted.options, *extra]
    log = run_logged(f"{peer}-install", [*command, *requirements], wanted.variables)
    if log.failed:
        errors = [line for line in log.lines if re.match(r"\s*(ERROR|error):?\s", line)]
        raise NotToBeHadError(
            f"pip could not install it: {' '.join((errors or log.lines)[-1].split())} ({log.path})"
        )
    stamp.write_text(recipe)
    return python


@dataclass(frozen=True, kw_only=True)
class Log:
    """What a command wrote.

    Attributes:
        path: of the file.
        lines: that are not empty; at least one.
        failed: whether its exit status was not 0.
    """

    path: Path
    lines: Sequence[str]
    failed: bool


def run_logged(name: str, command: Sequence[str], variables: Mapping[str, str], cwd: Path = ROOT) -> Log:
    """Run a command without the variables of our own interpreter; what it writes goes into a file."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"{name}.txt"
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    with path.open("wb") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**environment, **variables},
            check=False,
        )
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return Log(path=path, lines=lines or ["it wrote nothing"], failed=done.returncode != 0)


def _torch() -> str:
    """The requirement of torch in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))
