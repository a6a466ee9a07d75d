"""Qwen2.5-VL and Qwen3-VL against transformers, on layouts and media beside the recorded ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from opsin import LLM, SamplingParams
from tests.models.golden import recorded_logits
from tests.models.record import FAMILIES, IMAGE, VIDEO, Theirs, open_picture, write_checkpoint

PICTURES = [open_picture(name) for name in ("coffee_320x213.png", "rocket_400x80.png", "astronaut_96x96.png")]
PICTURES.append(PICTURES[0].resize((21, 3)))
PICTURES.append(PICTURES[1].resize((19, 900)))
FILM = [open_picture(f"video_{n}_112x84.png") for n in range(6)]

LAYOUTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen25vl-untied": ("qwen25vl", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "qwen25vl-windows of three": (
        "qwen25vl",
        {"vision_config": {"window_size": 84, "fullatt_block_indexes": [0, 2], "tokens_per_second": 25}},
    ),
    "qwen25vl-only windows": (
        "qwen25vl",
        {"vision_config": {"fullatt_block_indexes": [], "window_size": 112}},
    ),
    "qwen25vl-other shape": (
        "qwen25vl",
        {
            "hidden_size": 128,
            "num_attention_heads": 8,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]},
            "vision_config": {"hidden_size": 96, "num_heads": 6, "out_hidden_size": 128, "depth": 2},
        },
    ),
    "qwen3vl-untied": (
        "qwen3vl",
        {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}},
    ),
    "qwen3vl-one deep layer": (
        "qwen3vl",
        {"vision_config": {"deepstack_visual_indexes": [2], "num_position_embeddings": 100}},
    ),
    "qwen3vl-no deep layer": ("qwen3vl", {"vision_config": {"deepstack_visual_indexes": [], "depth": 1}}),
    "qwen3vl-other shape": (
        "qwen3vl",
        {
            "text_config": {
                "hidden_size": 96,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 32,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": [6, 5, 5],
                    "rope_type": "default",
                },
            },
            "vision_config": {"out_hidden_size": 96, "hidden_size": 32, "num_heads": 2},
        },
    ),
}

PROMPTS: Mapping[str, tuple[str, list[int], list[int], float]] = {
    "text": ("Hello, what a day", [], [], 2.0),
    "pictures of many shapes": (f"a {IMAGE}{IMAGE} b {IMAGE} c {IMAGE}{IMAGE}?", [0, 1, 2, 3, 4], [], 2.0),
    "a film": (f"see {VIDEO} and say", [], [6], 2.0),
    "films of other speeds": (f"{VIDEO} or {VIDEO}?", [], [5, 2], 0.7),
    "film, picture, film": (f"{VIDEO} then {IMAGE} then {VIDEO}.", [2], [2, 3], 30.0),
}
"""Text, pictures, lengths of films, frames per second."""


def layout_of(name: str) -> tuple[Any, dict[str, Any]]:
    family, changes = LAYOUTS[name]
    config = copy.deepcopy(dict(FAMILIES[family].config))
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return FAMILIES[family], config


@pytest.mark.parametrize("name", LAYOUTS)
def test_logprobs_and_tokens_are_transformers(tmp_path: Path, name: str) -> None:
    family, config = layout_of(name)
    write_checkpoint(tmp_path, family, config)
    theirs = Theirs(tmp_path, family)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=0)
    with LLM(str(tmp_path), dtype="float32", kv_cache_memory=2**24) as llm:
        for text, shown, lengths, fps in PROMPTS.values():
            films = [FILM[:length] for length in lengths]
            prompt = {
                "prompt": text,
                "multi_modal_data": {"image": [PICTURES[n] for n in shown], "video": films},
                "mm_processor_kwargs": {"fps": fps},
            }
            with recorded_logits(llm) as logits:
                [output] = llm.generate(prompt, params, use_tqdm=False)
            times = [[n / fps for n in range(length)] for length in lengths]
            inputs = theirs.inputs(text, [PICTURES[n] for n in shown], films, times)
            ids = inputs["input_ids"][0].tolist()
            assert output.prompt_token_ids == ids
            tokens = output.outputs[0].token_ids
            expected = theirs.logits(inputs, tokens[:-1])
            assert output.prompt_logprobs is not None
            found = torch.tensor([entry[i].logprob for entry, i in zip(output.prompt_logprobs[1:], ids[1:])])
            wanted = expected[: len(ids) - 1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert float((found - wanted).abs().max()) < 1e-4
            steps = expected[len(ids) - 1 :]
            assert float((torch.cat(logits)[-len(tokens) :] - steps).abs().max()) < 1e-4
            best = steps.topk(2).values
            unclear = (best[:, 0] - best[:, 1]) < 1e-3
            assert bool(((steps.argmax(-1) == torch.tensor(tokens)) | unclear).all())


@pytest.mark.parametrize("name", ["qwen25vl", "qwen3vl"])
def test_an_elongated_picture_is_refused(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, FAMILIES[name])
    prompt = {"prompt": IMAGE, "multi_modal_data": {"image": Image.new("RGB", (403, 2))}}
    with LLM(str(tmp_path), kv_cache_memory=2**22) as llm, pytest.raises(ValueError, match="too elongated"):
        llm.generate(prompt, use_tqdm=False)
