"""A tiny checkpoint in the hub's layout: random weights by transformers' own classes, its own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opsin.api import BuildContext
from opsin.testing.models.inside import build_unloaded, weight_shapes

SMALL: Mapping[str, Any] = {
    "num_hidden_layers": 2,
    "depth": 2,
    "hidden_size": 64,
    "embed_dim": 48,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
"""Sizes of configs that transformers' defaults would make large; ``changes`` go first."""

SMALL_VISION: Mapping[str, Any] = {
    **SMALL,
    "hidden_size": 48,
    "intermediate_size": 80,
    "out_hidden_size": SMALL["hidden_size"],
    "num_position_embeddings": 16,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
}
"""For a section whose name has "vision" in it: its sizes are not the text's, so that mix-ups show."""

SMALL_ROTARY = {"mrope_section": [2, 3, 3]}
"""Of ``rope_parameters``: half of ``head_dim``, on three axes."""

_WORDS = "the picture shows a cup of coffee and two cats on table near rocket what is it which one then"


def tiny_checkpoint(
    architecture: str,
    folder: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    tokens: Mapping[str, str] | None = None,
    special_tokens: Sequence[str] = (),
    processor: Callable[[Any], Any] | None = None,
    chat_template: str | None = None,
    shrink: bool = True,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with random weights, as a release of this architecture looks on the hub.

    Its weights are large enough to tell mistakes from rounding: norms are near 1, everything else is normal
    with a standard deviation of 0.15.

    Args:
        architecture: class of transformers, as in ``architectures`` of config.json.
        folder: existing or new; files are written over.
        changes: fields of config.json, nested as there (``{"text_config": {...}}``), over the shrunk
            defaults.
        tokens: field of config.json -> text of the special token whose id it has, for example
            ``{"image_token_id": "<image>"}``. A tokenizer whose processor asks for it gets it as an attribute
            of that name without ``_id`` or ``_index``, too.
        special_tokens: further special tokens, as a chat template has.
        processor: tokenizer -> transformers' processor, or image processor, to be saved with it; None: the
            image processor that transformers has for the model type, with its defaults.
        chat_template: of the tokenizer.
        shrink: make the default config small, see `SMALL`; False: ``changes`` say all sizes.
        seed: of the weights.

    Returns:
        The folder.

    Raises:
        ValueError: transformers has no such class.
    """
    import transformers

    model_class = getattr(transformers, architecture, None)
    config_class = getattr(model_class, "config_class", None)
    if model_class is None or config_class is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no model class {architecture!r}; for a family of "
            "its own, write config.json, tokenizer and safetensors yourself (opsin.testing.models."
            "tiny_tokenizer makes the tokenizer)"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = tokens or {}
    tokenizer = tiny_tokenizer(
        [*tokens.values(), *special_tokens],
        attributes={_attribute(field): text for field, text in tokens.items()},
        chat_template=chat_template,
    )
    tokenizer.save_pretrained(folder)

    fields = config_class().to_dict()
    if shrink:
        fields = _shrunk(fields, SMALL)
    fields = _merged(fields, changes or {})
    vocab_size = -(-len(tokenizer) // 32) * 32
    for section in (fields, fields.get("text_config")):
        if isinstance(section, dict):
            if "vocab_size" in section or section is not fields:
                section["vocab_size"] = vocab_size
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if name in section:
                    section[name] = tokenizer.eos_token_id
            section.update({k: tokenizer.convert_tokens_to_ids(v) for k, v in tokens.items() if k in section})
    for name in ("architectures", "transformers_version", "model_type"):
        fields.pop(name, None)
    config = config_class(**fields)
    for name, text in tokens.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(text))
    model = model_class(config).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    made = _default_processor(config.model_type) if processor is None else processor(tokenizer)
    if made is not None:
        made.save_pretrained(folder)
    return folder


def own_checkpoint(
    build: Callable[[BuildContext], Any],
    config: Mapping[str, Any],
    folder: str | Path,
    *,
    tokens: Mapping[str, str] | None = None,
    special_tokens: Sequence[str] = (),
    preprocessor: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with random weights for a family that transformers does not have.

    It has the tensors that the model takes, under the names it takes them by.

    Args:
        build: that of the `ModelSpec`.
        config: config.json, with all sizes; ``vocab_size``, ``eos_token_id`` and the ids of ``tokens`` are
            put in.
        folder: existing or new; files are written over.
        tokens: as for `tiny_checkpoint`.
        special_tokens: as for `tiny_checkpoint`.
        preprocessor: preprocessor_config.json.
        chat_template: of the tokenizer.
        seed: of the weights.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    folder, tokens = Path(folder), tokens or {}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer([*tokens.values(), *special_tokens], chat_template=chat_template)
    tokenizer.save_pretrained(folder)
    ids = {field: tokenizer.convert_tokens_to_ids(text) for field, text in tokens.items()}
    sizes = {"vocab_size": -(-len(tokenizer) // 32) * 32, "eos_token_id": tokenizer.eos_token_id}
    written = {**config, **ids, **sizes, "torch_dtype": "float32"}
    if isinstance(config.get("text_config"), Mapping):
        written["text_config"] = {**config["text_config"], **sizes}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in weight_shapes(build_unloaded(build, written)).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight") and len(shape) == 1
        tensors[name] = 1 + 0.1 * noise if is_norm else 0.15 * noise
    save_file(tensors, folder / "model.safetensors")
    for file, content in (("config.json", written), ("preprocessor_config.json", preprocessor)):
        if content is not None:
            (folder / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give a model weights that tell mistakes from rounding, see `tiny_checkpoint`."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            path, _, leaf = name.rpartition(".")
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in type(modules[path]).__name__.lower() and leaf == "weight"
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.15 * noise)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def tiny_tokenizer(
    special_tokens: Sequence[str] = (),
    *,
    attributes: Mapping[str, str] | None = None,
    chat_template: str | None = None,
) -> Any:
    """A byte-level tokenizer (transformers' PreTrainedTokenizerFast) with a few words of its own.

    Args:
        special_tokens: besides ``<|endoftext|>``, which ends a text.
        attributes: name -> special token, as processors of transformers ask for (``image_token``).
        chat_template: Jinja text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    special = list(dict.fromkeys([end, *special_tokens]))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 64, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([_WORDS] * 4, trainer)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=end,
        pad_token=end,
        extra_special_tokens=dict(attributes or {}),
        chat_template=chat_template,
    )


def _attribute(field: str) -> str:
    """``image_token_id`` and ``image_token_index`` -> ``image_token``."""
    return field.removesuffix("_id").removesuffix("_index")


def _shrunk(fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with small sizes; what is null stays so, and what has an entry per layer is left out."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            found[name] = _shrunk(value, SMALL_VISION if "vision" in name else SMALL)
        elif isinstance(value, Mapping) and name.startswith("rope_"):
            found[name] = {**value, **{key: SMALL_ROTARY[key] for key in SMALL_ROTARY if key in value}}
        elif name != "layer_types":
            found[name] = value if value is None else sizes.get(name, value)
    if "embed_dim" in found and "hidden_size" in found:  # then this is the width of what the tower gives
        found["hidden_size"] = SMALL["hidden_size"]
    if isinstance(found.get("image_size"), int) and isinstance(found.get("patch_size"), int):
        found["image_size"] = 5 * found["patch_size"]
    return found


def _merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(fields)
    for name, value in changes.items():
        nested = (
            isinstance(value, Mapping) and isinstance(found.get(name), Mapping) and name.endswith("_config")
        )
        found[name] = _merged(found[name], value) if nested else value
    return found


def _default_processor(model_type: str) -> Any:
    """transformers' image processor of a model type, the one without torchvision; None: there is none."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    if isinstance(names, Mapping):  # transformers 5
        name = names.get("pil")
    else:
        name = names[0] if names else None
    made = getattr(transformers, name, None) if name else None
    return None if made is None else made()
