"""The synthetic checkpoint in the peers' own formats, each made once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from peers.environments import NotToBeHadError, run_logged

BENCHMARKS = Path(__file__).resolve().parents[1]


def exported(peer: str, form: str, model: Path, python: str) -> Path:
    """Folder of the model in this form.

    Raises:
        NotToBeHadError: the peer's own tool failed.
    """
    folder = model.parent / f"{model.name}-{peer}-{form}"
    if folder.exists():
        return folder
    print(f"{peer}: exporting the model as {form}", file=sys.stderr, flush=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = _COMMANDS[peer](form, model, partial, python)
    log = run_logged(f"{peer}-export-{form}", command, {"HF_HUB_OFFLINE": "1"}, BENCHMARKS)
    if log.failed:
        raise NotToBeHadError(f"the export as {form} failed: {' '.join(log.lines[-1].split())} ({log.path})")
    partial.rename(folder)
    return folder


def _openvino(form: str, model: Path, folder: Path, python: str) -> list[str]:
    tool = str(Path(python).with_name("optimum-cli"))
    more = ["--group-size", "128", "--ratio", "1.0"] if form == "int4" else []
    task = ["--task", "image-text-to-text", "--weight-format", form, *more]
    return [tool, "export", "openvino", "--model", str(model), *task, str(folder)]


def _llamacpp(form: str, model: Path, folder: Path, python: str) -> list[str]:
    return [python, "-m", "peers.engines.gguf_export", str(model), form, str(folder)]


_COMMANDS: dict[str, Callable[[str, Path, Path, str], list[str]]] = {
    "openvino": _openvino,
    "llamacpp": _llamacpp,
}
