"""Check that no field of a checkpoint's JSON files is passed over in silence."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opsin.checkpoint.hub import locate
from opsin.errors import OpsinError
from opsin.testing.models.outcome import CheckFailed, require
from opsin.testing.models.subject import ModelUnderTest

FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

SILENT = frozenset(
    {
        # For training.
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "dropout"),
        *("ignore_index", "initializer_range", "initializer_factor", "projection_dropout"),
        # For one implementation, or for finding it.
        *("_name_or_path", "auto_map", "architectures", "model_type", "transformers_version", "use_cache"),
        *("processor_class", "image_processor_type", "video_processor_type", "feature_extractor_type"),
        *("pretraining_tp", "torch_dtype", "dtype", "_attn_implementation", "_attn_implementation_autoset"),
        *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
        *(
            "data_format",
            "input_data_format",
            "return_tensors",
            "device",
            "return_metadata",
            "disable_grouping",
        ),
        # What core decides.
        *("bos_token_id", "pad_token_id", "do_convert_rgb", "is_encoder_decoder", "problem_type"),
        *("id2label", "label2id", "chat_template"),
        "tie_word_embeddings",  # a head in the file that differs from the embeddings is used in any case
    }
)
"""Fields that may be changed without consequence in every family."""


def config_fields(model: ModelUnderTest) -> str:
    """Each field that is changed changes the answer, a limit or an error; none is passed over in silence."""
    source = locate(model.checkpoint)
    silent: list[str] = []
    tried = 0
    with tempfile.TemporaryDirectory(prefix="opsin-fields-") as name:
        folder = Path(name)
        for entry in source.iterdir():
            (folder / entry.name).symlink_to(entry.resolve())
        unchanged = _observed(model, folder)
        for file in FILES:
            if not (source / file).is_file():
                continue
            original = json.loads((source / file).read_text(encoding="utf-8"))
            (folder / file).unlink()
            below = original.get("text_config") if file == "config.json" else None
            for path, value in _leaves(original):
                if value is None or _is_listed(file, path, model.unread) or path[0] in (below or ()):
                    continue  # of a field on both levels, text_config's counts
                tried += 1
                for other in _changed(value):
                    (folder / file).write_text(json.dumps(_with(original, path, other)), encoding="utf-8")
                    if _noticed(model, folder, unchanged, f"{'.'.join(path)}={other!r:.60} in {file}"):
                        break
                else:
                    silent.append(f"{'.'.join(path)} of {file}")
            (folder / file).write_text(json.dumps(original), encoding="utf-8")
    require(
        not silent,
        f"no difference when these fields change: {', '.join(silent)}",
        "another answer or an error that names the field",
        "what the family reads of config.json (opsin.layers.fields, text_config); a field that nothing is "
        "meant to read is listed as ModelUnderTest(unread=)",
    )
    return f"{tried} fields"


def _noticed(model: ModelUnderTest, folder: Path, unchanged: object, what: str) -> bool:
    try:
        return _observed(model, folder) != unchanged
    except OpsinError:
        return True
    except CheckFailed:
        return True
    except Exception as error:
        raise CheckFailed(
            f"{type(error).__name__}: {error} with {what}",
            "a ValueError of the builder that names the field",
            "what the family reads of config.json: opsin.layers.fields checks types, the builder the rest",
        ) from error


def _observed(model: ModelUnderTest, folder: Path) -> tuple[Any, ...]:
    """What questions about each modality come to."""
    media = {modality: model.media(modality)[:2] for modality in model.modalities}
    with model.load(folder, max_num_batched_tokens=4096) as llm:
        other = ModelUnderTest(folder, plugins=model.plugins, max_tokens=2)
        other.adopt(llm)
        found = []
        for modality, items in [("", []), *media.items()]:
            for value in items or [None]:
                given = {} if value is None else {modality: [value]}
                answer = other.one(other.prompt(given, " and a cup of coffee on the table?"))
                found.append((answer.prompt_token_ids, [round(value, 5) for value in answer.logprobs]))
        info = llm.engine.info
        return found, info.max_model_len, sorted(llm.engine.frontend.eos_token_ids)


def _is_listed(file: str, path: Sequence[str], unread: frozenset[str]) -> bool:
    names = {path[0], path[-1], ".".join(path[-2:]), ".".join(path), f"{file}/{'.'.join(path)}"}
    return bool(names & unread) or path[-1] in SILENT or path[0] in ("auto_map", "id2label", "label2id")


def _leaves(data: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _changed(value: Any) -> Iterator[Any]:
    """Other values of the same type."""
    match value:
        case bool():
            yield not value
        case int():
            yield from (value + 1, value * 2, max(value // 2, 1), 1, value * 300)
        case float():
            yield from (value * 1.5 + 0.01, value / 3)
        case str():
            yield value + "x"
        case [first, *rest]:
            for other in _changed(first):
                yield [other, *rest]
            yield rest


def _with(data: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy with one value changed."""
    changed = copy.deepcopy(dict(data))
    section = changed
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return changed
