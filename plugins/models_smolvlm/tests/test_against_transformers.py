"""Our Idefics3 and SmolVLM against transformers', on checkpoints of several layouts with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import LLM
from tests.models.golden import picture
from tests.models.made.compare import compare
from tests.models.made.smolvlm import SPECIAL, SmolVLM, frames_of

PICTURES = [picture(f"{name}.png") for name in ("coffee_320x213", "rocket_400x80", "cat_150x240")]
PLAIN = SPECIAL[:5]
"""The special tokens of Idefics3: rows, columns and the whole picture are words like others."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 256,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "smolvlm": {},
    "idefics3": {
        "idefics": True,
        "special": PLAIN,
        "text": {"rope_parameters": LLAMA3, "num_key_value_heads": 4},
    },
    "three-by-three": {
        "vision": {"image_size": 54, "patch_size": 6, "hidden_act": "gelu"},
        "changes": {"scale_factor": 3, "tie_word_embeddings": True},
        "settings": {"size": {"longest_edge": 108}, "resample": 3, "image_mean": [0.4, 0.5, 0.6]},
    },
    "larger squares than the position table": {
        "settings": {"max_image_size": {"longest_edge": 48}, "size": {"height": 70, "width": 90}}
    },
    "squares with a rest": {"vision": {"image_size": 36}, "settings": {"size": {"longest_edge": 100}}},
    "never split": {"settings": {"do_image_splitting": False}},
}
TEXTS = {
    "text alone": ("Hello, what a day", 0),
    "one": ("<|im_start|>User:<image>What is it?<end_of_utterance>\nAssistant:", 1),
    "several": ("<image><image> and\n<image>: which?", 3),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = SmolVLM(folder, **LAYOUTS[request.param])
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**23) as llm:
        assert not llm.engine.executor.weights.unexpected
        yield llm, theirs


@pytest.mark.parametrize("text", TEXTS)
def test_pictures(pair: tuple[LLM, SmolVLM], text: str) -> None:
    prompt, count = TEXTS[text]
    compare(*pair, prompt, {"image": PICTURES[:count]})


@pytest.mark.parametrize("option", [{"do_image_splitting": False}, {"size": {"longest_edge": 60}}])
def test_options(pair: tuple[LLM, SmolVLM], option: dict[str, Any]) -> None:
    compare(*pair, "<image> or <image>?", {"image": PICTURES[:2]}, **option)


VIDEOS: dict[str, tuple[str, list[Any], int]] = {
    "frames": ("<|im_start|>User: <video>What happens?", [frames_of(PICTURES)], 0),
    "timed frames, and a picture": (
        "<|im_start|>User: <video>What<image> is it?<video>",
        [(frames_of(PICTURES), 2.0), frames_of(PICTURES[:1])],
        1,
    ),
    "sampled": ("See<video>", [(frames_of(PICTURES * 8), 4.0)], 0),
    "sampled without its ends": ("See <video>\n", [(frames_of(PICTURES * 8), 2.0)], 0),
    "longer than a minute": ("See <video>\n", [(frames_of(PICTURES), 0.03)], 0),
}


@pytest.fixture(
    scope="module", params=[None, {"fps": 1, "max_frames": 5, "video_size": {"longest_edge": 90}}]
)
def video_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    settings = {} if request.param is None else {"video_sampling": request.param}
    theirs = SmolVLM(folder, settings=settings)
    if settings:  # which a file without a size of its own has for videos
        file = folder / "preprocessor_config.json"
        given = json.loads(file.read_text())
        (folder / "video_preprocessor_config.json").write_text(
            json.dumps({key: given[key] for key in given if key != "size"})
        )
    with LLM(str(folder), dtype="float32", kv_cache_memory=2**23) as llm:
        yield llm, theirs


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(video_pair: tuple[LLM, SmolVLM], name: str) -> None:
    prompt, videos, count = VIDEOS[name]
    if video_pair[1].sampling is None and "sampled" in name:
        videos = [(frames[:12], fps) for frames, fps in videos]
    compare(*video_pair, prompt, {"video": videos, "image": PICTURES[:count]})


def test_the_tower_is_transformers(tmp_path: Path) -> None:
    theirs = SmolVLM(tmp_path)
    inputs = theirs.inputs("<image><image>", {"image": PICTURES[:2]})
    with torch.inference_mode():
        expected = theirs.model.model.get_image_features(**inputs.media).pooler_output[0]
    with LLM(str(tmp_path), dtype="float32", kv_cache_memory=2**23) as llm:
        prompt = {"prompt": "<image><image>", "multi_modal_data": {"image": PICTURES[:2]}}
        media = llm.engine.frontend.processor.process(prompt).media
        with torch.inference_mode():
            given = llm.engine.executor.model.encode("image", [item.mapped for item in media])
    assert float((torch.cat(list(given)) - expected).abs().max()) < 1e-5
