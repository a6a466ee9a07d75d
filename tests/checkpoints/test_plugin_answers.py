"""Wrong answers of a plugin are caught where they are given, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import opsin_models_qwen2vl.inputs as inputs
import opsin_models_qwen2vl.model as family
from opsin import LLM, SamplingParams
from opsin.api import Placeholder, Positions, repeat_token
from opsin.errors import CheckpointError, OpsinError, PluginError, RequestError
from tests.models.golden import GOLDEN

MODEL = str(GOLDEN / "qwen2vl" / "model")


def load() -> LLM:
    return LLM(MODEL, dtype="float32", kv_cache_memory=2**22)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with load() as loaded:
        yield loaded


def ask(llm: LLM) -> None:
    prompt = "a<|vision_start|><|image_pad|><|vision_end|>b"
    data = {"prompt": prompt, "multi_modal_data": {"image": Image.new("RGB", (56, 56))}}
    llm.generate(data, SamplingParams(max_tokens=2), use_tqdm=False)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (np.zeros(3, np.int64), r"positions are int64 \(3,\); expected int64 \(axes, tokens\)"),
        (np.zeros((0, 3), np.int64), r"positions are int64 \(0, 3\)"),
        (np.zeros((3, 3), np.int32), r"positions are int32 \(3, 3\)"),
        (np.zeros((3, 3)), r"positions are float64"),
        ([[0, 1]], "positions are list"),
    ],
)
def test_positions_are_checked_when_they_are_made(prompt: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Positions(prompt=prompt)
    with pytest.raises(ValueError, match="ascending"):
        Positions(prompt=np.zeros((1, 1), np.int64), switch_lengths=(5, 5))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 5), r"5 positions for \d+ tokens; the plugin of Qwen2VL"),
        ((1, None), "positions have 1 rows, expected 3"),
    ],
)
def test_positions_of_the_wrong_shape(llm: LLM, shape: Any, words: str) -> None:
    def positions(config: Any, ids: Any, media: Any) -> Positions:
        return Positions(prompt=np.zeros((shape[0], shape[1] or len(ids)), np.int64))

    object.__setattr__(llm.engine.frontend.processor.model_spec, "positions", positions)
    try:
        with pytest.raises(RequestError, match=words):
            ask(llm)
    finally:
        object.__setattr__(llm.engine.frontend.processor.model_spec, "positions", None)


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("logits", lambda out: out[:, :-1], r"the model gave logits \(1, 607\), expected \(1, 608\)"),
        ("forward", lambda out: out[:, :-1], r"the model gave \(\d+, 63\) for embeddings \(\d+, 64\)"),
        (
            "encode",
            lambda out: [part[1:] for part in out],
            r"the encoder gave \(3, 64\) for one image, expected \(4",
        ),
    ],
)
def test_tensors_of_the_wrong_shape(llm: LLM, method: str, change: Callable[[Any], Any], words: str) -> None:
    model = llm.engine.executor.model
    right = getattr(model, method)
    setattr(model, method, MethodType(lambda self, *args: change(right(*args)), model))
    with pytest.raises(RequestError, match=words):
        ask(llm)


@pytest.mark.parametrize(
    ("built", "words"),
    [
        (None, "built a NoneType for Qwen2VLForConditionalGeneration without kv_geometry, hidden_size"),
        (torch.nn.Linear(2, 2), "built a Linear .*without kv_geometry, .*logits; expected a torch.nn.Module"),
    ],
)
def test_what_is_no_model(monkeypatch: pytest.MonkeyPatch, built: Any, words: str) -> None:
    monkeypatch.setattr(family, "Qwen2VL", lambda context: built)
    with pytest.raises(PluginError, match=words):
        load()


def test_a_placeholder_without_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def placeholder(*args: Any) -> Placeholder:
        return Placeholder(text=lambda number: "<|vision_start|>", expand=repeat_token(5), token_id=5)

    monkeypatch.setattr(inputs, "placeholder", placeholder)
    with pytest.raises(CheckpointError, match=r"'<\|vision_start\|>', does not have its token 5 once"):
        load()


def test_a_rule_that_gives_two_tensors_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "RENAMES", {**family.RENAMES, r"layers\.1\.": "layers.0."})
    with pytest.raises(
        OpsinError, match=r"tensors .*layers.0.* and .*layers.1.* are both for the layer's .*layers.0"
    ):
        load()


def test_a_wrong_rule_is_reported_with_the_names_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "RENAMES", {**family.RENAMES, r"^model\.norm\.": "model.final_norm."})
    words = r"1 missing \(model.norm.weight\); 1 unexpected \(model.norm.weight, renamed to model.final_norm"
    with pytest.raises(CheckpointError, match=words):
        load()
