"""Where a checkpoint's files are: a folder, an installed package, ModelScope, or the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path

from opsin.api import CHECKPOINT_GROUP
from opsin.errors import CheckpointError, MissingPluginError, did_you_mean
from opsin.plugins.known_packages import known_packages, pip_install

DATA_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""The only files that are downloaded: no Python, no weights in formats that run code when they are read."""

MODELSCOPE_VARIABLE = "OPSIN_USE_MODELSCOPE"


def locate(model: str, *, revision: str | None = None) -> Path:
    """The folder that holds a model's files, downloaded if need be.

    Args:
        model: a folder, the name of an installed checkpoint, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        MissingPluginError: the checkpoint comes in a package that is not installed.
        CheckpointError: there is no such folder or hub id, or the hub cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.exists():
        raise CheckpointError(f"{model!r} is a GGUF file, which is not read; pass a folder with safetensors")
    if folder.exists():
        raise CheckpointError(f"{model!r} is a file; pass the folder that holds config.json and the weights")
    if installed := sorted(entry_points(group=CHECKPOINT_GROUP, name=model), key=lambda entry: entry.value):
        return _installed_folder(model, installed)
    if model in known_packages().checkpoints:
        raise MissingPluginError(_not_installed(model))
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        beside = [str(folder.parent / name) for name in _folders(folder.parent)]
        raise CheckpointError(f"the folder {model!r} does not exist{did_you_mean(str(folder), beside)}")
    if os.environ.get(MODELSCOPE_VARIABLE, "") not in ("", "0"):
        return _from_modelscope(model, revision)
    return _from_hugging_face(model, revision)


def _installed_folder(model: str, found: Sequence[EntryPoint]) -> Path:
    if len(found) > 1:
        packages = " and ".join(entry.dist.name if entry.dist else entry.value for entry in found)
        raise CheckpointError(f"{model!r} is provided by {packages}; uninstall one, or pass a folder")
    try:
        folder = Path(found[0].load()())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"the package of {model!r} is broken: {reason}") from error
    if not folder.is_dir():
        raise CheckpointError(f"the package of {model!r} is broken: {folder} is not a folder; reinstall it")
    return folder


def _not_installed(model: str) -> str:
    """What to install for a checkpoint that comes as a package: that, and the plugin of its architecture."""
    checkpoint = known_packages().checkpoints[model]
    plugin = known_packages().architectures[checkpoint.architecture]
    missing = f"the checkpoint {model!r} is not installed"
    try:
        version(plugin)
    except PackageNotFoundError:
        missing += f", and neither is a plugin for its architecture {checkpoint.architecture!r}"
        return f"{missing} ({checkpoint.package}, {plugin}): {pip_install(checkpoint.package, plugin)}"
    return f"{missing} ({checkpoint.package}): {pip_install(checkpoint.package)}"


def _from_modelscope(model: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{MODELSCOPE_VARIABLE} is set and the package modelscope is not installed: "
            f"pip install modelscope, or unset {MODELSCOPE_VARIABLE}"
        ) from error
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=DATA_FILES))
    except Exception as error:  # its own errors have no common class
        raise CheckpointError(_failed(model, "ModelScope", error)) from error


def _from_hugging_face(model: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    nowhere = (
        f"{model!r}{did_you_mean(model, _known_models())} is neither a folder nor an installed checkpoint"
    )
    explanations = {  # the first that fits
        errors.HFValidationError: f"{nowhere}, nor a hub id (owner/name)",
        errors.GatedRepoError: f"{model!r} may be downloaded only after its terms are accepted on the hub; "
        "accept them there, then log in with: hf auth login",
        errors.RevisionNotFoundError: f"{model!r} has no revision {revision!r} on the hub",
        errors.RepositoryNotFoundError: f"{nowhere}, nor on the hub (if it is private: hf auth login)",
        errors.LocalEntryNotFoundError: f"{nowhere}, it is not in the hub's local cache, and the hub cannot "
        "be reached (HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 forbids downloads)",
    }
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=DATA_FILES))
    except (OSError, errors.HFValidationError) as error:
        known = (text for kind, text in explanations.items() if isinstance(error, kind))
        raise CheckpointError(next(known, None) or _failed(model, "the hub", error)) from error


def _known_models() -> list[str]:
    """What could have been meant: installed checkpoints, folders here, and what the hub's cache holds."""
    from huggingface_hub.constants import HF_HUB_CACHE

    installed = {entry.name for entry in entry_points(group=CHECKPOINT_GROUP)}
    cached = {
        name.removeprefix("models--").replace("--", "/")
        for name in _folders(Path(HF_HUB_CACHE))
        if name.startswith("models--")
    }
    return sorted({*installed, *known_packages().checkpoints, *_folders(Path()), *cached})


def _folders(parent: Path) -> list[str]:
    try:
        return [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _failed(model: str, where: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{model!r} could not be downloaded from {where}: {type(error).__name__}: {text:.300}"
