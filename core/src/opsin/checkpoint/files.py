"""A checkpoint: its folder, what its JSON files say, its weight files, its tokenizer.

Nothing in a checkpoint's folder is ever executed: JSON, safetensors and templates are read, Python files
and pickles are not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from opsin.checkpoint.hub import locate
from opsin.errors import CheckpointError, ConfigError, require_known
from opsin.params import GENERATION_CONFIG, SamplingParams
from opsin.plugins.claims import reason_of

_UNSAFE_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "model.safetensors.index.json"
_ORIGINAL = "take the original checkpoint, with config.json and safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What the files of a checkpoint say.

    Attributes:
        path: its folder.
        architecture: first of config.json's ``architectures``.
        config: config.json.
        generation_config: generation_config.json, or empty.
        preprocessor: ``image_processor`` in processor_config.json (where transformers 5 writes it), else
            preprocessor_config.json, or empty.
        video_preprocessor: ``video_processor`` in processor_config.json, else video_preprocessor_config.json,
            else preprocessor_config.json, or empty.
        dtype: element type of the weights according to config.json, by default ``"float32"``.
        eos_token_ids: ids that end a text: those of generation_config.json and of config.json together.
        chat_templates: name -> Jinja source; the usual one is named "default".
        revision_key: hex digest of the folder's names, sizes, times and config.json. Checkpoints with
            different keys must not share cached keys and values.
    """

    path: Path
    architecture: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    video_preprocessor: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    revision_key: str = ""

    @property
    def chat_template(self) -> str | None:
        """The usual chat template."""
        return self.chat_templates.get("default")

    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted.

        Raises:
            CheckpointError: there are none, or one of several is missing.
        """
        index = self.path / _INDEX
        if index.is_file():
            names = sorted(set(self.weight_map().values()))
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

    def weight_map(self) -> Mapping[str, str]:
        """Key -> name of the file whose copy of the tensor counts; empty without an index.

        Raises:
            CheckpointError: the index cannot be read.
        """
        weight_map = read_json(self.path / _INDEX, needed=False).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{self.path / _INDEX}: weight_map must be an object of file names")
        return weight_map

    def read_json(self, name: str) -> dict[str, Any]:
        """Another JSON file of the folder; empty if there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        return read_json(self.path / PurePosixPath(name).name, needed=False)

    def quantization(self) -> dict[str, Any] | None:
        """How the weights are quantised: ``quantization_config``, its ``quant_method`` always set; or None.

        Raises:
            CheckpointError: it names no method, or one that is not read.
        """
        for source in (self.config, self.config.get("text_config") or {}):
            for name in ("quantization_config", "compression_config"):
                settings = source.get(name)
                if not settings:
                    continue
                if not isinstance(settings, dict):
                    raise CheckpointError(f"{self.path}: {name} is {settings!r:.80}; expected an object")
                default = "compressed-tensors" if name == "compression_config" else None
                method = settings.get("quant_method", default)
                if not isinstance(method, str) or not method:
                    raise CheckpointError(
                        f"{self.path}: {name} has quant_method {method!r:.80}; expected the name of one"
                    )
                if method == "gguf":
                    raise CheckpointError(f"{self.path} is quantised as GGUF, which is not read; {_ORIGINAL}")
                return {**settings, "quant_method": method}
        return None


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
    _check_kind(path)
    config = read_json(path / "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(
            f"{path / 'config.json'} names no architecture: expected a list under 'architectures', "
            f"got {architectures!r}"
        )
    if not isinstance(config.get("text_config") or {}, dict):
        raise CheckpointError(
            f"{path / 'config.json'}: text_config is {config['text_config']!r:.80}, no object"
        )
    generation_config = read_json(path / "generation_config.json", needed=False)
    return Checkpoint(
        path=path,
        architecture=str(architectures[0]),
        config=config,
        generation_config=generation_config,
        preprocessor=_processor_settings(path, "image_processor", "preprocessor_config.json"),
        video_preprocessor=_processor_settings(
            path, "video_processor", "video_preprocessor_config.json", "preprocessor_config.json"
        ),
        dtype=_dtype(config, path),
        eos_token_ids=_eos_token_ids(path, generation_config, config),
        chat_templates=_chat_templates(path),
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


def _check_kind(path: Path) -> None:
    """Refuse, by what it is, a folder that is no model."""
    adapter = read_json(path / "adapter_config.json", needed=False)
    if adapter:
        raise CheckpointError(
            f"{path} is an adapter ({adapter.get('peft_type', 'LoRA')}) for "
            f"{adapter.get('base_model_name_or_path')!r}, and adapters are not supported; merge it into that "
            "model (peft: merge_and_unload, save_pretrained), or remove adapter_config.json from a merged one"
        )
    if not (path / "config.json").is_file() and (found := sorted(path.glob("*.gguf"))):
        raise CheckpointError(f"{path} holds GGUF files ({found[0].name}), which are not read; {_ORIGINAL}")


def _processor_settings(path: Path, section: str, *names: str) -> dict[str, Any]:
    """As transformers 5 looks for them: in processor_config.json, then in files of their own."""
    for settings in (
        read_json(path / "processor_config.json", needed=False).get(section),
        *(read_json(path / name, needed=False) for name in names),
    ):
        if isinstance(settings, dict) and settings:
            return settings
    return {}


def _dtype(config: Mapping[str, Any], path: Path) -> str:
    text = config.get("text_config") or {}
    found = (source.get(name) for source in (config, text) for name in ("dtype", "torch_dtype"))
    dtype = next((value for value in found if value), "float32")
    if not isinstance(dtype, str):
        raise CheckpointError(f"{path / 'config.json'}: dtype (or torch_dtype) is {dtype!r}; expected a name")
    return dtype.removeprefix("torch.")


def sampling_defaults(checkpoint: Checkpoint, source: str, override: Mapping[str, Any]) -> Mapping[str, Any]:
    """A generation_config: the checkpoint's (``auto``), none (``vllm``) or a folder's, with ``override``.

    Raises:
        CheckpointError: the folder has no such file.
        ConfigError: ``override`` has a field that does not say how answers are sampled.
        OpsinError: a value cannot be.
    """
    require_known("override_generation_config", override, GENERATION_CONFIG, ConfigError)
    if source == "vllm":
        found: Mapping[str, Any] = {}
    elif source == "auto":
        found = checkpoint.generation_config
    else:
        file = Path(source).expanduser() / "generation_config.json"
        if not file.is_file():
            raise CheckpointError(
                f"generation_config={source!r}: there is no {file}; expected auto, vllm, or a folder with one"
            )
        found = read_json(file)
    defaults = {**found, **override}
    if override or source != "auto":  # what a checkpoint says is its own matter until it is used
        SamplingParams.from_generation_config(defaults)
    return defaults


def _eos_token_ids(path: Path, *sources: Mapping[str, Any]) -> tuple[int, ...]:
    """From generation_config, config and its text_config."""
    ids: set[int] = set()
    for source in (*sources, *(source["text_config"] for source in sources if source.get("text_config"))):
        found = source.get("eos_token_id")
        found = [] if found is None else found if isinstance(found, list) else [found]
        if not all(type(token) is int for token in found):
            raise CheckpointError(f"{path}: eos_token_id is {found!r}; expected an integer or a list of them")
        ids.update(found)
    return tuple(sorted(ids))


def _chat_templates(path: Path) -> dict[str, str]:
    """Name -> Jinja source; the first file that has any counts, as in transformers."""
    found = {file.stem: file for file in (path / "additional_chat_templates").glob("*.jinja")}
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        found["default"] = jinja
        return {name: file.read_text(encoding="utf-8") for name, file in found.items()}
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        templates = read_json(path / name, needed=False).get("chat_template")
        if isinstance(templates, str):
            return {"default": templates}
        try:
            if isinstance(templates, list):
                return {str(entry["name"]): str(entry["template"]) for entry in templates}
            if templates is not None:
                return {str(name): str(template) for name, template in templates.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / name}: chat_template has no names and templates") from error
    return {}


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


@contextmanager
def settings_explained(path: Path, builder: Callable[..., Any]) -> Iterator[None]:
    """Whatever a plugin's builder makes of settings it cannot follow becomes a `CheckpointError`.

    Args:
        path: the checkpoint's folder.
        builder: the plugin's function, which is called inside the block.

    Raises:
        CheckpointError: the builder has failed.
    """
    where = getattr(builder, "__module__", type(builder).__name__)
    try:
        yield
    except ConfigError:  # a setting of the user's
        raise
    except ValueError as error:  # what a builder says itself
        raise CheckpointError(f"the settings in {path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(
            f"the settings in {path}: {where} needs the field {error}, which is not there"
        ) from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"the settings in {path}: {where} cannot follow them: {reason_of(error)}"
        ) from error


def _no_weights(path: Path) -> str:
    unsafe = sorted(file.name for file in path.iterdir() if file.suffix in _UNSAFE_WEIGHTS)
    if not unsafe:
        gguf = sorted(file.name for file in path.glob("*.gguf"))
        found = f", found only {gguf[0]} (GGUF is not read)" if gguf else ""
        return f"{path} has no weights: expected *.safetensors{found}"
    return (
        f"{path} has no *.safetensors, only {', '.join(unsafe[:4])}: a format that can run code when it is "
        "read. Convert the weights to safetensors (safetensors.torch.save_file), if you trust them"
    )
