"""Saves a checkpoint again with the transformers of the Python that runs this, and records what has changed.

    python tests/checkpoints/resave.py SOURCE TARGET

TARGET gets every file that is not as in SOURCE, but no weights: ``resaved.json`` names the files that are as
they were, and tensors with another name. Families whose classes are remote code get configuration classes
that inherit as theirs do; their tensors keep their names, and their processor's files stay, as they do there.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)


class Phi3VConfig(PretrainedConfig):
    """As in microsoft/Phi-3-vision-128k-instruct: plain fields, ``rope_scaling`` among them."""

    model_type = "phi3_v"

    def __init__(
        self,
        vocab_size: int = 32064,
        hidden_size: int = 3072,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 4096,
        original_max_position_embeddings: int = 4096,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: Any = None,
        sliding_window: int | None = None,
        embd_layer: Any = None,
        **kwargs: Any,
    ) -> None:
        given = {
            name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")
        }
        for name, value in given.items():
            setattr(self, name, value)
        super().__init__(**kwargs)


class MiniCPMConfig(PretrainedConfig):
    """As in openbmb/MiniCPM-V-2."""

    model_type = "minicpmv"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_scaling: Any = None,
        scale_emb: float = 1,
        dim_model_base: int = 1,
        scale_depth: float = 1,
        query_num: int = 64,
        drop_vision_last_layer: bool = True,
        **kwargs: Any,
    ) -> None:
        given = {
            name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")
        }
        for name, value in given.items():
            setattr(self, name, value)
        super().__init__(**kwargs)


class MiniCPMVLlamaConfig(LlamaConfig):
    """As in openbmb/MiniCPM-Llama3-V-2_5."""

    model_type = "minicpmv"

    def __init__(self, query_num: int = 64, drop_vision_last_layer: bool = True, **kwargs: Any) -> None:
        self.query_num, self.drop_vision_last_layer = query_num, drop_vision_last_layer
        super().__init__(**kwargs)


class MiniCPMVQwen2Config(Qwen2Config):
    """As in openbmb/MiniCPM-V-2_6."""

    model_type = "minicpmv"

    def __init__(self, query_num: int = 64, drop_vision_last_layer: bool = True, **kwargs: Any) -> None:
        self.query_num, self.drop_vision_last_layer = query_num, drop_vision_last_layer
        super().__init__(**kwargs)


REMOTE: dict[str, type[PretrainedConfig]] = {
    "phi3_v": Phi3VConfig,
    "2.5": MiniCPMVLlamaConfig,
    "2.6": MiniCPMVQwen2Config,
    "minicpmv": MiniCPMConfig,
}


def resave(source: Path, target: Path) -> None:
    """Save ``source`` again into ``target``."""
    config = json.loads((source / "config.json").read_text())
    [architecture] = config["architectures"]
    original = load_file(source / "model.safetensors")
    keys = {key: key for key in original}
    kept = {"preprocessor_config.json", "chat_template.json"}
    kind = REMOTE.get(str(config.get("version"))) or REMOTE.get(config["model_type"])
    if kind is not None:
        kind(**config).save_pretrained(target)
        PreTrainedTokenizerFast.from_pretrained(source).save_pretrained(target)
        kept.add("generation_config.json")
    else:
        model = getattr(transformers, architecture).from_pretrained(source, torch_dtype="auto")
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            for file in Path(saved).glob("*.json"):
                shutil.copy(file, target)
            keys = matched(load_file(Path(saved) / "model.safetensors"), original)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
        if save_processor(source, target, architecture.replace("ForConditionalGeneration", "Processor")):
            kept = set()
    config = json.loads((target / "config.json").read_text())
    config.pop("_name_or_path", None)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    same = kept & {file.name for file in source.iterdir()}
    for file in list(target.iterdir()):
        if (source / file.name).exists() and content(file) == content(source / file.name):
            file.unlink()
            same.add(file.name)
    same -= {file.name for file in target.iterdir()}
    renamed = {key: old for key, old in keys.items() if key != old}
    assert set(keys.values()) == set(original)
    record = {"same_files": sorted(same), "renamed": renamed}
    (target / "resaved.json").write_text(json.dumps(record, indent=0))


def save_processor(source: Path, target: Path, name: str) -> bool:
    """Save the processor, or where this transformers wants torchvision for it, its image processor alone."""
    try:
        getattr(transformers, name).from_pretrained(source).save_pretrained(target)
    except (ImportError, OSError, TypeError, ValueError):
        AutoImageProcessor.from_pretrained(source).save_pretrained(target)
        return False
    return True


def matched(saved: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> dict[str, str]:
    """Saved key -> original key of the tensor with the same values."""
    left = dict(original)
    found = {}
    for key, tensor in saved.items():
        equal = [old for old, o in left.items() if o.shape == tensor.shape and torch.equal(o, tensor)]
        found[key] = max(equal, key=lambda old: ends_alike(old, key))
        del left[found[key]]
    return found


def ends_alike(left: str, right: str) -> int:
    """How many parts at the end of two keys are the same."""
    pairs = zip(reversed(left.split(".")), reversed(right.split(".")))
    return next((count for count, (one, other) in enumerate(pairs) if one != other), len(left))


def content(file: Path) -> Any:
    """What a file says, whichever way its JSON is laid out."""
    return json.loads(file.read_text()) if file.suffix == ".json" else file.read_bytes()


if __name__ == "__main__":
    destination = Path(sys.argv[2])
    destination.mkdir(parents=True, exist_ok=True)
    resave(Path(sys.argv[1]), destination)
