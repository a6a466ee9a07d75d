"""Finding a checkpoint, reading what its files say, and never running what is in it."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import EntryPoint, EntryPoints, PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from opsin.checkpoint import files as checkpoint
from opsin.checkpoint import hub
from opsin.checkpoint.tokenizer import load_tokenizer
from opsin.errors import CheckpointError, MissingPluginError
from opsin.plugins.known_packages import pip_install


def write(folder: Path, **files: Any) -> Path:
    """A checkpoint folder: name with ``__`` for the dot -> JSON object, or text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


CONFIG = {"architectures": ["Toy", "Other"], "model_type": "toy"}


def load(folder: Path, **files: Any) -> checkpoint.Checkpoint:
    return checkpoint.load(str(write(folder, **{"config__json": CONFIG, **files})))


# --------------------------------------------------------------------------------------------------
# What the files say
# --------------------------------------------------------------------------------------------------


def test_everything_in_a_folder(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        config__json={**CONFIG, "torch_dtype": "bfloat16", "eos_token_id": 9},
        generation_config__json={"eos_token_id": [1, 2], "temperature": 0.5},
        preprocessor_config__json={"size": 4},
        chat_template__jinja="{{ messages }}",
    )
    assert found.path == tmp_path
    assert found.architecture == "Toy"
    assert found.config["model_type"] == "toy"
    assert found.generation_config["temperature"] == 0.5
    assert found.preprocessor == {"size": 4}
    assert found.dtype == "bfloat16"
    assert found.eos_token_ids == (1, 2, 9)
    assert found.chat_template == "{{ messages }}"


def test_what_is_absent_has_a_default(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert (found.generation_config, found.preprocessor) == ({}, {})
    assert found.dtype == "float32"
    assert found.eos_token_ids == ()
    assert found.chat_template is None


def test_preprocessor_inside_of_the_processors_settings(tmp_path: Path) -> None:
    """As transformers 5 writes it, and reads it: before a file of its own."""
    nested = {"image_processor": {"size": 7}, "processor_class": "ToyProcessor"}
    assert load(tmp_path, processor_config__json=nested).preprocessor == {"size": 7}
    found = load(tmp_path, processor_config__json=nested, preprocessor_config__json={"size": 4})
    assert found.preprocessor == {"size": 7}
    assert load(tmp_path, processor_config__json={"processor_class": "Toy"}).preprocessor == {"size": 4}


def test_videos_have_settings_of_their_own(tmp_path: Path) -> None:
    assert load(tmp_path).video_preprocessor == {}
    found = load(tmp_path, preprocessor_config__json={"size": 4})
    assert found.video_preprocessor == {"size": 4}, "those for images, where there are no others"
    found = load(tmp_path, video_preprocessor_config__json={"size": 5})
    assert (found.preprocessor, found.video_preprocessor) == ({"size": 4}, {"size": 5})
    found = load(tmp_path, processor_config__json={"video_processor": {"size": 6}})
    assert (found.preprocessor, found.video_preprocessor) == ({"size": 4}, {"size": 6})


def test_plugins_read_other_files(tmp_path: Path) -> None:
    found = load(tmp_path, adaptor__json={"a": 1})
    assert found.read_json("adaptor.json") == {"a": 1}
    assert found.read_json("../adaptor.json") == {"a": 1}, "never outside of the folder"
    assert found.read_json("absent.json") == {}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"torch_dtype": None}, "float32"),
    ],
)
def test_dtype(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    assert load(tmp_path, config__json={**CONFIG, **config}).dtype == dtype


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": 4}, (3, 4)),
        ({}, {"eos_token_id": [4, 0]}, (0, 4)),
        ({}, {"text_config": {"eos_token_id": 0}}, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": 4, "text_config": {"eos_token_id": [5]}}, (4, 5)),
    ],
)
def test_end_of_sequence_ids(tmp_path: Path, generation: Any, config: Any, ids: tuple[int, ...]) -> None:
    found = load(tmp_path, config__json={**CONFIG, **config}, generation_config__json=generation)
    assert found.eos_token_ids == ids


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"chat_template__json": {"chat_template": "from json"}}, "from json"),
        ({"tokenizer_config__json": {"chat_template": "from tokenizer"}}, "from tokenizer"),
        (
            {
                "chat_template__jinja": "from jinja",
                "chat_template__json": {"chat_template": "from json"},
                "tokenizer_config__json": {"chat_template": "from tokenizer"},
            },
            "from jinja",
        ),
        (
            {
                "chat_template__json": {"chat_template": "from json"},
                "tokenizer_config__json": {"chat_template": "from tokenizer"},
            },
            "from json",
        ),
        (
            {
                "tokenizer_config__json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "tools"},
                        {"name": "default", "template": "plain"},
                    ]
                }
            },
            "plain",
        ),
    ],
)
def test_chat_template(tmp_path: Path, files: dict[str, Any], template: str) -> None:
    assert load(tmp_path, **files).chat_template == template


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{not json", "config.json cannot be read"),
        ([1], "expected a JSON object, got a list"),
        ({}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
    ],
)
def test_unusable_config(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, config__json=config)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json; is it a model's folder\?"):
        checkpoint.load(str(tmp_path))


def test_revision_key_follows_config_and_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    keys = [load(tmp_path).revision_key]
    weights.write_bytes(b"1")
    keys.append(load(tmp_path).revision_key)
    weights.write_bytes(b"12")
    keys.append(load(tmp_path).revision_key)
    again = load(tmp_path, config__json={**CONFIG, "rope_theta": 2})
    keys.append(again.revision_key)
    assert len(set(keys)) == len(keys)
    assert checkpoint.load(str(tmp_path)).revision_key == again.revision_key


# --------------------------------------------------------------------------------------------------
# Weight files
# --------------------------------------------------------------------------------------------------


def names(found: checkpoint.Checkpoint) -> list[str]:
    return [file.name for file in found.weight_files()]


def test_weights_through_the_index(tmp_path: Path) -> None:
    index = {"weight_map": {"b": "two.safetensors", "a": "one.safetensors", "c": "two.safetensors"}}
    found = load(tmp_path, model__safetensors__index__json=index)
    touch(tmp_path, "one.safetensors", "two.safetensors", "unrelated.safetensors")
    assert names(found) == ["one.safetensors", "two.safetensors"]
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 weight files are missing \(one\.safetensors\)"):
        found.weight_files()


def test_weights_without_an_index(tmp_path: Path) -> None:
    found = load(tmp_path)
    touch(tmp_path, "consolidated.safetensors")
    assert names(found) == ["consolidated.safetensors"]
    touch(tmp_path, "model-00002-of-00003.safetensors", "model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(model-00003-of-00003\.safetensors\)"):
        found.weight_files()
    touch(tmp_path, "model-00003-of-00003.safetensors")
    assert names(found) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_index_naming_a_file_elsewhere(tmp_path: Path) -> None:
    for name in ("../one.safetensors", "/one.safetensors"):
        found = load(tmp_path, model__safetensors__index__json={"weight_map": {"a": name}})
        with pytest.raises(CheckpointError, match="outside of its folder"):
            found.weight_files()


def test_no_weights_and_pickled_weights(tmp_path: Path) -> None:
    found = load(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no weights: expected \*\.safetensors"):
        found.weight_files()
    touch(tmp_path, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin.*Convert the weights to safetensors"):
        found.weight_files()


# --------------------------------------------------------------------------------------------------
# Where the files are
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as if it were installed as the checkpoint ``maker/toy``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "checkpoint_package_of_toy", raising=False)
    folder = tmp_path / "installed_toy"
    folder.mkdir()
    source = f"from pathlib import Path\ndef path():\n    return Path({str(folder)!r})\n"
    (tmp_path / "checkpoint_package_of_toy.py").write_text(source)
    entry = EntryPoint(name="maker/toy", value="checkpoint_package_of_toy:path", group="opsin.checkpoints.v1")
    monkeypatch.setattr(hub, "entry_points", EntryPoints([entry]).select)
    return folder


def test_installed_checkpoint(installed: Path) -> None:
    assert hub.locate("maker/toy") == installed


def test_local_folder_goes_before_an_installed_checkpoint(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker" / "toy").mkdir(parents=True)
    assert hub.locate("maker/toy") == Path("maker/toy")


def test_installed_checkpoint_whose_folder_is_gone(installed: Path) -> None:
    installed.rmdir()
    with pytest.raises(CheckpointError, match="the package of 'maker/toy' is broken"):
        hub.locate("maker/toy")


@pytest.mark.parametrize("plugin_installed", [False, True])
def test_known_checkpoint_that_is_not_installed(
    installed: Path, monkeypatch: pytest.MonkeyPatch, plugin_installed: bool
) -> None:
    name, known = next(iter(hub.known_packages().checkpoints.items()))
    plugin = hub.known_packages().architectures[known.architecture]

    def version(distribution: str) -> str:
        if distribution == plugin and plugin_installed:
            return "1.0"
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(hub, "version", version)
    with pytest.raises(MissingPluginError) as caught:
        hub.locate(name)
    message = str(caught.value)
    packages = [known.package] if plugin_installed else [known.package, plugin]
    assert pip_install(*packages) in message
    assert (plugin in message) == (not plugin_installed)
    assert (known.architecture in message) == (not plugin_installed)


@pytest.mark.parametrize("model", ["./absent", "~/absent", "/absent/folder", "a/b/c"])
def test_folder_that_does_not_exist(model: str) -> None:
    with pytest.raises(CheckpointError, match="the folder .* does not exist"):
        hub.locate(model)


def test_what_could_have_been_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders beside it, installed checkpoints, folders here, and what the hub's cache holds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("my-model", "cache/models--maker--a-fine-model", "cache/datasets--maker--data"):
        (tmp_path / name).mkdir(parents=True)
    for wrong, meant in {
        "./my-modle": "my-model",
        f"{tmp_path}/mymodel": f"{tmp_path}/my-model",
        "my-mdoel": "my-model",
        "maker/fine-model": "maker/a-fine-model",
        "opsin/tiny-qwen2-vl": "opsin/tiny-qwen2vl",
    }.items():
        with pytest.raises(CheckpointError, match=re.escape(f"(did you mean {meant!r}?)")):
            hub.locate(wrong)
    with pytest.raises(CheckpointError) as caught:
        hub.locate("nobody/knows-this")
    assert "did you mean" not in str(caught.value)


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors")
    with pytest.raises(CheckpointError, match="is a file; pass the folder"):
        hub.locate(str(tmp_path / "model.safetensors"))


def test_offline_and_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        hub.locate("nobody/has-this")
    assert "the hub cannot be reached" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_name_that_cannot_be_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match="nor a hub id"):
        hub.locate("not an id")


def test_hub_is_asked_for_data_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(model: str, **options: Any) -> str:
        asked.update(model=model, **options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.locate("owner/model", revision="v2") == tmp_path
    assert (asked["model"], asked["revision"]) == ("owner/model", "v2")
    assert not [p for p in asked["allow_patterns"] if p.endswith((".py", ".bin", ".pt", "*"))]


def test_modelscope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPSIN_USE_MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)  # as if it were not installed
    with pytest.raises(CheckpointError, match="pip install modelscope, or unset OPSIN_USE_MODELSCOPE"):
        hub.locate("owner/model")

    def snapshot_download(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        if model != "owner/model":
            raise ValueError("no such\nmodel")
        assert "*.py" not in allow_patterns
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=snapshot_download))
    assert hub.locate("owner/model") == tmp_path
    with pytest.raises(
        CheckpointError, match="could not be downloaded from ModelScope: ValueError: no such model"
    ):
        hub.locate("owner/other")


# --------------------------------------------------------------------------------------------------
# Tokenizers, and code that wants to run
# --------------------------------------------------------------------------------------------------


def word_tokenizer() -> str:
    tokenizer = Tokenizer(WordLevel({"[unk]": 0, "hello": 1, "world": 2}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = Whitespace()
    return str(tokenizer.to_str())


MALICIOUS = """
from pathlib import Path
Path({marker!r}).touch()
class Evil:
    pass
Config = Model = ImageProcessor = Tokenizer = Evil
"""


def test_code_in_a_checkpoint_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "it-ran"
    code = MALICIOUS.format(marker=str(marker))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    folder = tmp_path / "malicious"
    found = load(
        folder,
        config__json={**CONFIG, "auto_map": auto_map},
        tokenizer_config__json={
            "tokenizer_class": "Tokenizer",
            "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        },
        preprocessor_config__json={"auto_map": {"AutoImageProcessor": "evil.ImageProcessor"}},
        tokenizer__json=word_tokenizer(),
        evil__py=code,
        __init____py=code,
        sitecustomize__py=code,
    )
    tokenizer = load_tokenizer(found.path)
    assert tokenizer.encode("world hello") == [2, 1]
    touch(folder, "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        found.weight_files()
    assert not marker.exists()
    # The code works: what was shown is that nobody ran it.
    exec(compile(code, "evil.py", "exec"), {})
    assert marker.exists()


def test_unknown_model_type_takes_tokenizer_json(tmp_path: Path) -> None:
    folder = write(tmp_path, config__json=CONFIG, tokenizer__json=word_tokenizer())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("hello there world") == [1, 0, 2]
    assert tokenizer.decode([1, 2]) == "hello world"


def test_known_model_type_takes_transformers_own_class(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        config__json={"model_type": "bert"},
        tokenizer_config__json={"tokenizer_class": "BertTokenizer", "do_lower_case": True},
        vocab__txt="[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n",
    )
    assert load_tokenizer(folder).encode("Hello") == [2, 5, 3]


def test_folder_without_a_usable_tokenizer(tmp_path: Path) -> None:
    folder = write(tmp_path, config__json=CONFIG, tokenizer_config__json={"tokenizer_class": "ToyTokenizer"})
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*'ToyTokenizer'"):
        load_tokenizer(folder)
    write(folder, tokenizer__json="{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(folder)
