"""No value of a checkpoint's JSON files moves the answer in silence, and none is ignored but those listed.

Each field of config.json and of the processor's settings is changed in several ways. A change is noticed if
it gives other logits, another prompt, another context, dtype or end of text, or an error.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.errors import OpsinError
from tests.checkpoints.test_resaved import RECORDED, built
from tests.models.families import FAMILIES
from tests.models.golden import GOLDEN, recorded_logits

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"

SILENT: Mapping[str, str] = {
    # For training.
    "attention_dropout": "training",
    "embd_pdrop": "training",
    "resid_pdrop": "training",
    "ignore_index": "training: the label that has no loss",
    "initializer_range": "training",
    "hidden_dropout_prob": "training",
    "projection_dropout": "training",
    "layer_scale_init_value": "training: what the layers' factors began as",
    "use_mask_token": "training: of patches that are masked",
    # For one implementation, or for finding it.
    "_name_or_path": "where the file came from",
    "_note_tiny": "a remark",
    "auto_map": "names of Python classes, which are never run",
    "batch_vision_input": "how the hub's code makes its batches",
    "image_processor_type": "a class's name; what SigLIP's means is read of it",
    "model_type": "the architecture says it",
    "pretraining_tp": "how the hub's code splits its sums",
    "processor_class": "a class's name",
    "text_config.architectures": "the class of the language model alone",
    "transformers_version": "who wrote the file",
    "use_cache": "there always is one",
    "vision_batch_size": "how the hub's code makes its batches",
    "slice_config.model_type": "the name of a section",
    # What nothing reads, in transformers neither.
    "bos_token_id": "prompts have it from the tokenizer",
    "do_convert_rgb": "pictures are RGB when they come",
    "mm_use_im_start_end": "the marks are always there, as in the hub's code",
    "pad_token_id": "nothing is padded",
    "_pad_token_id": "nothing is padded",
    "text_config.eos_token_id": "what ends a text stands at the top, or in generation_config.json",
    "video_sampling.fps": "of videos whose times are known",
    "video_sampling.max_frames": "of videos whose times are known",
    "version": "of the processor",
    "vision_config.in_chans": "in_channels is what the class reads",
    "vision_config.projection_dim": "of CLIP's head over both towers, which is not stored",
    "vision_config.spatial_patch_size": "patch_size is what the class reads",
    "vision_config.vocab_size": "of CLIP's text tower",
    "vision_end_token_id": "the placeholder's text has the mark",
    "vision_start_token_id": "the placeholder's text has the mark",
    "vision_token_id": "nothing is padded",
    # What another field decides.
    "image_size": "of MiniCPM-V at the top: scale_resolution decides",
    "max_window_layers": "with use_sliding_window only; the context then ends with the window",
    "sliding_window": "where the window is off, or longer than the context",
    "image_seq_length": "of the processor: the tower and the grid decide",
    "initializer_factor": "training",
    "text_config.dtype": "that at the top goes first",
    "text_config.torch_dtype": "that at the top goes first",
    "vision_config.dtype": "the whole model has one",
    "tie_word_embeddings": "where the file has a head: that is used",
    "vocab_size": "of LLaVA at the top: that of text_config decides",
}
"""Field, alone or below its section -> why it may be changed without consequence."""

_SLICING = "preprocessor_config.json goes first"

SILENT_IN: Mapping[str, Mapping[str, str]] = {
    CONFIG: {
        "max_slice_nums": _SLICING,
        "patch_size": _SLICING,
        "scale_resolution": _SLICING,
        "slice_config.max_slice_nums": _SLICING,
        "slice_config.patch_size": _SLICING,
        "slice_config.scale_resolution": _SLICING,
        "slice_mode": _SLICING,
        "use_image_id": _SLICING,
    },
    PROCESSOR: {
        "aspect_ratio_setting": "nothing reads it, in transformers neither",
        "crop_to_patches": "of InternVL: its processor always says that pictures are cut",
        "do_pad": "of LLaVA-NeXT: pads the crops of a batch, which has none",
        "do_resize": "of LLaVA-NeXT: all crops have the tower's size",
    },
}
"""The same for one file, except below ``vision_config``."""

NULLABLE = {
    "do_center_crop",
    "do_pad",
    "dtype",
    "eos_token_id",
    "head_dim",
    "layer_types",
    "longest_edge",
    "shortest_edge",
    "image_grid_pinpoints",
    "image_mean",
    "image_std",
    "max_pixels",
    "min_pixels",
    "mrope_interleaved",
    "num_key_value_heads",
    "torch_dtype",
    "use_sliding_window",
}
"""Where null stands for the default, as in all of MiniCPM-V's processor settings."""

ALSO: Mapping[str, Sequence[Any]] = {
    "hidden_act": ["gelu"],
    "model_type": ["clip_vision_model"],
    "rope_scaling": [{"type": "linear", "factor": 2.0}],
    "sliding_window": [16],
    "dtype": ["bfloat16"],
    "torch_dtype": ["bfloat16"],
    "vision_encoder": ["vit_large_patch14"],
    "min_pixels": [10**6],
    "min_patches": [12],
    "rms_norm_eps": [0.5],
    "shortest_edge": [10**6],
}
"""Values to try besides those made from the field's own."""

ADDED: Sequence[Mapping[str, Any]] = (
    {"attention_bias": True},
    {"head_dim": 8},
    {"layer_types": ["linear_attention"]},
    {"mlp_bias": True},
    {"num_key_value_heads": 1},
    {"partial_rotary_factor": 0.5},
    {"quantization_config": {"quant_method": "awq"}},
    {"rms_norm_eps": 0.5},
    {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    {"rope_theta": 77.0},
    {"sliding_window": 64, "use_sliding_window": True},
)
"""Fields that other checkpoints have; put among the language model's, they must not be passed over either."""


def leaves(data: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def perturbed(name: str, value: Any) -> Iterator[Any]:
    """Other values of the same type."""
    match value:
        case bool():
            yield not value
        case int():
            yield from (value + 1, value * 2, max(value // 2, 1), 1)
        case float():
            yield from (value * 1.5, value / 3)
        case str():
            yield value + "x"
        case [first, *rest]:
            yield from ([next(perturbed(name, first)), *rest], rest)
    for other in ALSO.get(name, ()):
        if other != value:
            yield other


def with_value(data: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy with one value changed; without a path, ``value`` has several."""
    changed = copy.deepcopy(dict(data))
    section = changed
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section.update(value if path[-1] == "" else {path[-1]: value})
    return changed


class Checkpoint:
    """A recorded checkpoint, one of whose files is replaced."""

    def __init__(self, name: str, folder: Path) -> None:
        family, _, version = name.partition("@")
        self.family, self.folder = FAMILIES[family], folder
        source = GOLDEN / family / "model"
        if version:
            source = built(RECORDED / version / family, source, folder.parent / f"{folder.name}-resaved")
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
        files = [name for name in (CONFIG, PROCESSOR) if (folder / name).exists()]
        self.original = {name: json.loads((folder / name).read_text()) for name in files}
        self.nested = self.original[CONFIG].get("text_config", {})
        for config in (self.original[CONFIG], self.nested):
            if "use_sliding_window" in config:  # a window that would be noticed
                config["sliding_window"] = 512
        self.unchanged = self.observed()

    def observed(self) -> tuple[Any, ...]:
        """What a question about a picture (and a video) comes to."""
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 260, 3), np.uint8))
        media: dict[str, Any] = {"image": [picture]}
        prompt = f"a{self.family.image_text(1)}b"
        if self.family.name.startswith("qwen"):
            media["video"] = [[picture, picture, picture]]
            prompt += self.family.image_text(1).replace("image", "video")
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        with LLM(str(self.folder), kv_cache_memory=2**26) as llm, recorded_logits(llm) as logits:
            [output] = llm.generate({"prompt": prompt, "multi_modal_data": media}, params, use_tqdm=False)
            info = llm.engine.info
            return (
                output.prompt_token_ids,
                [step.double().numpy().round(5).tolist() for step in logits],
                sorted(llm.engine.frontend.eos_token_ids),
                info.max_model_len,
            )

    def outcome(self, file: str, path: Sequence[str], value: Any) -> str | None:
        """The error, "changed", or None if nobody noticed."""
        target = self.folder / file
        target.unlink()
        target.write_text(json.dumps(with_value(self.original[file], path, value)))
        try:
            return None if self.observed() == self.unchanged else "changed"
        except OpsinError as error:
            return str(error)
        finally:
            target.write_text(json.dumps(self.original[file]))


NAMES = [
    *sorted(FAMILIES),
    "qwen2vl@4.57.6",
    *(f"{name}@5.23.0" for name in ("qwen2vl", "llava_next", "phi3v")),
]


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(request.param, tmp_path_factory.mktemp("model"))


def reason(checkpoint: Checkpoint, file: str, path: Sequence[str]) -> str | None:
    if file == CONFIG and path[0] in checkpoint.nested:
        return "text_config goes first"
    if path[0] == "size" and "min_pixels" in checkpoint.original[file]:
        return "min_pixels and max_pixels go first"
    names = (".".join(path[-2:]), path[-1], path[0] if path[0] == "auto_map" else "")
    more = {} if path[0] == "vision_config" else SILENT_IN[file]
    return next((reasons[name] for name in names for reasons in (SILENT, more) if name in reasons), None)


@pytest.mark.parametrize("file", [CONFIG, PROCESSOR])
def test_a_changed_value_is_noticed_or_listed(checkpoint: Checkpoint, file: str) -> None:
    silent, tried, listed = [], 0, 0
    for path, value in leaves(checkpoint.original.get(file, {})):
        tried += 1
        listed += reason(checkpoint, file, path) is not None
        if reason(checkpoint, file, path) is None and not any(
            checkpoint.outcome(file, path, other) for other in perturbed(path[-1], value)
        ):
            silent.append(".".join(path))
    print(f"{checkpoint.family.name} {file}: {tried} fields tried, {listed} listed, silent: {silent}")
    assert not silent


@pytest.mark.parametrize("file", [CONFIG, PROCESSOR])
def test_a_value_of_another_type_is_an_error_that_names_the_field(checkpoint: Checkpoint, file: str) -> None:
    wrong = []
    for path, value in leaves(checkpoint.original.get(file, {})):
        if reason(checkpoint, file, path) is None and value is not None:
            optional = path[-1] in NULLABLE or (file == PROCESSOR and "minicpmv" in checkpoint.family.name)
            nothing = () if optional else (None,)
            for other in ("1" if not isinstance(value, str) else 1, *nothing, [[]]):
                outcome = checkpoint.outcome(file, path, other)
                if outcome is None or (path[-1] not in outcome and outcome != "changed"):
                    wrong.append((".".join(path), other, outcome))
    assert not wrong


def test_fields_of_other_checkpoints_are_noticed(checkpoint: Checkpoint) -> None:
    path = ("text_config", "") if "text_config" in checkpoint.original[CONFIG] else ("",)
    silent = [values for values in ADDED if not checkpoint.outcome(CONFIG, path, values)]
    assert not silent
