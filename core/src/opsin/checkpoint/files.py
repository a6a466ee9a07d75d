"""A checkpoint: its folder, what its JSON files say, its weight files, its tokenizer.

Nothing in a checkpoint's folder is ever executed: JSON, safetensors and templates are read, Python files
and pickles are not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from opsin.checkpoint.hub import locate
from opsin.errors import CheckpointError

_UNSAFE_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What the files of a checkpoint say.

    Attributes:
        path: its folder.
        architecture: first of config.json's ``architectures``.
        config: config.json.
        generation_config: generation_config.json, or empty.
        preprocessor: preprocessor_config.json, else ``image_processor`` in processor_config.json (where
            transformers 5 writes it), or empty.
        dtype: element type of the weights according to config.json, by default ``"float32"``.
        eos_token_ids: ids that end a text.
        chat_template: Jinja source, or None.
        revision_key: hex digest of the folder's names, sizes, times and config.json. Checkpoints with
            different keys must not share cached keys and values.
    """

    path: Path
    architecture: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    revision_key: str = ""

    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted.

        Raises:
            CheckpointError: there are none, or one of several is missing.
        """
        index = self.path / _INDEX
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names):
                raise CheckpointError(f"{index} names files outside of its folder")
            files = [self.path / name for name in names]
            missing = [file for file in files if not file.is_file()]
        else:
            # Some repositories keep a second copy under another name.
            files = sorted(self.path.glob("model*.safetensors")) or sorted(self.path.glob("*.safetensors"))
            missing = _missing_shards(files)
        if missing:
            shown = ", ".join(file.name for file in missing[:4]) + ", ..." * (len(missing) > 4)
            raise CheckpointError(
                f"{self.path} is incomplete: {len(missing)} weight files are missing ({shown}); "
                "download it again"
            )
        if not files:
            raise CheckpointError(_no_weights(self.path))
        return files


def load(model: str, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and read its JSON files (not its weights).

    Args:
        model: a folder, the name of an installed checkpoint, or a hub id; see `locate`.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: it cannot be found or read, or names no architecture.
        MissingPluginError: the checkpoint comes in a package that is not installed.
    """
    path = locate(model, revision=revision)
    config = read_json(path / "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(
            f"{path / 'config.json'} names no architecture: expected a list under 'architectures', "
            f"got {architectures!r}"
        )
    generation_config = read_json(path / "generation_config.json", needed=False)
    return Checkpoint(
        path=path,
        architecture=str(architectures[0]),
        config=config,
        generation_config=generation_config,
        preprocessor=_preprocessor(path),
        dtype=_dtype(config),
        eos_token_ids=_eos_token_ids(generation_config, config),
        chat_template=_chat_template(path),
        revision_key=_revision_key(path),
    )


def read_json(path: Path, *, needed: bool = True) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is absent and not ``needed``.

    Raises:
        CheckpointError: it is needed and absent, cannot be read, or is no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not needed:
            return {}
        raise CheckpointError(f"{path.parent} has no {path.name}; is it a model's folder?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} cannot be used: expected a JSON object, got a {type(data).__name__}")
    return data


def _preprocessor(path: Path) -> dict[str, Any]:
    return (
        read_json(path / "preprocessor_config.json", needed=False)
        or read_json(path / "processor_config.json", needed=False).get("image_processor")
        or {}
    )


def _dtype(config: Mapping[str, Any]) -> str:
    text = config.get("text_config") or {}
    found = (source.get(name) for source in (config, text) for name in ("dtype", "torch_dtype"))
    return next((str(value) for value in found if value), "float32").removeprefix("torch.")


def _eos_token_ids(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    """From generation_config, else config, else its text_config: the first that has any."""
    nested = [source["text_config"] for source in sources if source.get("text_config")]
    for source in (*sources, *nested):
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(int(i) for i in ids) if isinstance(ids, list) else (int(ids),)
    return ()


def _chat_template(path: Path) -> str | None:
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(path / name, needed=False).get("chat_template")
        if isinstance(template, list):  # several named ones
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is not None:
            return str(template)
    return None


def _revision_key(path: Path) -> str:
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.iterdir()):
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _missing_shards(files: Sequence[Path]) -> list[Path]:
    """Absent files that names like ``model-00001-of-00003`` imply."""
    implied: set[Path] = set()
    for file in files:
        if found := re.fullmatch(r"(.*-)(\d+)(-of-(\d+)\.safetensors)", file.name):
            stem, number, rest, total = found.groups()
            implied |= {file.with_name(f"{stem}{i:0{len(number)}}{rest}") for i in range(1, int(total) + 1)}
    return sorted(implied - set(files))


def _no_weights(path: Path) -> str:
    unsafe = sorted(file.name for file in path.iterdir() if file.suffix in _UNSAFE_WEIGHTS)
    if not unsafe:
        return f"{path} has no weights: expected *.safetensors"
    return (
        f"{path} has no *.safetensors, only {', '.join(unsafe[:4])}: a format that can run code when it is "
        "read. Convert the weights to safetensors (safetensors.torch.save_file), if you trust them"
    )
