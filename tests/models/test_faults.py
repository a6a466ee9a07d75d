"""Families with one mistake each: the contract suite names it.

The family is Qwen2-VL with one part replaced; without a mistake it passes (plugins/models_qwen2vl/tests).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opsin import hookimpl
from opsin.api import Expansion, MappedMedia, MediaItem, Placeholder, Positions
from opsin.plugins import Plugins, load_plugins
from opsin.testing.models import (
    CheckFailed,
    ModelCase,
    ModelUnderTest,
    check_model,
    compare_with_transformers,
    make_images,
    model_checks,
)
from opsin_models_qwen2vl import plugin
from opsin_models_qwen2vl.inputs import ImageMapper
from opsin_models_qwen2vl.model import Qwen2VL
from tests.models.golden import GOLDEN

FOLDER = GOLDEN / "qwen2vl" / "model"
CHECKS = {check.name: check for check in model_checks()}
PAD = "<|image_pad|>"


@dataclass(frozen=True)
class Fault:
    """A mistake, and what is to be said about it.

    Attributes:
        check: name of the check that has to fail.
        message: pattern of its message.
        model, mapper: classes instead of the family's.
        placeholder, positions: placeholder and positions, made of the right ones.
        settings: of the engine.
    """

    check: str
    message: str
    model: type[Qwen2VL] = Qwen2VL
    mapper: type[ImageMapper] = ImageMapper
    placeholder: Callable[[Placeholder], Placeholder] = lambda right: right
    positions: Callable[[Positions, Sequence[Any]], Positions] = lambda right, media: right
    settings: Mapping[str, Any] = field(default_factory=dict)

    def plugins(self) -> Plugins:
        """The CPU, and the family with the mistake, for pictures alone."""
        [spec] = plugin.opsin_register_models()
        [image_mapper, _] = plugin.opsin_register_input_mappers()
        [image, _] = plugin.opsin_register_placeholders()

        def positions(config: Any, ids: Sequence[int], media: Sequence[Any]) -> Positions:
            assert spec.positions is not None
            return self.positions(spec.positions(config, ids, media), media)

        def placeholder(context: Any) -> Placeholder:
            right = image.build(context)
            assert right is not None
            return self.placeholder(right)

        specs = {
            "opsin_register_models": replace(spec, build=self.model, positions=positions),
            "opsin_register_input_mappers": replace(image_mapper, build=self.mapper),
            "opsin_register_placeholders": replace(image, build=placeholder),
        }
        hooks = {name: _hook(name, made) for name, made in specs.items()}
        return load_plugins(deny=["models_qwen2vl"], extra={"faulty": SimpleNamespace(**hooks)})


def _hook(name: str, spec: Any) -> Any:
    return hookimpl(lambda: [spec], specname=name)


# ---- mistakes of the model ------------------------------------------------------------------------


class DependsOnNeighbours(Qwen2VL):
    def encode(self, modality: str, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        rows = super().encode(modality, items)
        return [part - torch.cat(list(rows)).mean(0) for part in rows]


class SwapsItems(Qwen2VL):
    def encode(self, modality: str, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        rows = super().encode(modality, sorted(items, key=lambda item: -item.num_embeds))
        return list(rows)


class GivesDoubles(Qwen2VL):
    def encode(self, modality: str, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        return [rows.float() for rows in super().encode(modality, items)]


class LooksAway(Qwen2VL):
    def encode(self, modality: str, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        blank = [
            replace(i, tensors={"pixel_values": torch.zeros_like(i.tensors["pixel_values"])}) for i in items
        ]
        return super().encode(modality, blank)


class RemembersTheStep(Qwen2VL):
    """Counts positions from the step's first token."""

    def forward(self, step: Any) -> Tensor:
        return super().forward(replace(step, positions=step.positions - step.positions[:, :1]))


class HeadOverTheBatch(Qwen2VL):
    def logits(self, hidden: Tensor) -> Tensor:
        given = super().logits(hidden)
        return given - given.mean(0)


class IgnoresEps(Qwen2VL):
    def __init__(self, context: Any) -> None:
        super().__init__(replace(context, config={**context.config, "rms_norm_eps": 1e-6}))


# ---- mistakes of the inputs -----------------------------------------------------------------------


class CountsOneMore(ImageMapper):
    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        right = super().map(item, options)
        return replace(right, num_embeds=right.num_embeds + 1)

    def count_embeds(self, *size: Any) -> int:
        return super().count_embeds(*size) + 1


class Forecasts(ImageMapper):
    def count_embeds(self, *size: Any) -> int:
        return super().count_embeds(*size) // 2


class Spoils(ImageMapper):
    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        if item.pixels is not None:
            item.pixels[..., 0] = 0
        return super().map(item, options)


class KeepsABuffer(ImageMapper):
    """Hands out one tensor again and again."""

    _buffer: Tensor | None = None

    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        right = super().map(item, options)
        if item.pixels is None:
            return right
        values = right.tensors["pixel_values"]
        if self._buffer is None or len(self._buffer) < len(values):
            self._buffer = torch.zeros(4 * len(values), values.shape[1])
        self._buffer[: len(values)] = values
        return replace(right, tensors={"pixel_values": self._buffer[: len(values)]})


class ForgetsTheGrid(ImageMapper):
    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        right = super().map(item, options)
        return right if item.embeds is None else replace(right, geometry=(1, 2, 2 * right.num_embeds))


class Crashes(ImageMapper):
    def map(self, item: MediaItem, options: Mapping[str, Any]) -> MappedMedia:
        if item.pixels is not None and min(item.pixels.shape[:2]) < 3:
            raise IndexError("list index out of range")
        return super().map(item, options)


def one_token_less(right: Placeholder) -> Placeholder:
    def expand(mapped: MappedMedia, number: int) -> Expansion:
        found = right.expand(mapped, number)
        return Expansion(token_ids=found.token_ids[1:], is_embed=found.is_embed[1:])

    return replace(right, expand=expand)


def off_by_one(right: Positions, media: Sequence[Any]) -> Positions:
    return replace(right, delta=right.delta + 1) if media else right


def as_int32(right: Positions, media: Sequence[Any]) -> Positions:
    return Positions(prompt=right.prompt.astype(np.int32), delta=right.delta)


FAULTS = {
    "delta off by one": Fault("positions", r"delta of -?\d+ that gives", positions=off_by_one),
    "positions of int32": Fault("positions", r"positions are int32 .* expected int64", positions=as_int32),
    "encoder depends on neighbours": Fault(
        "encoder-neighbours", r"off when 4 are encoded together", model=DependsOnNeighbours
    ),
    "encoder swaps items": Fault("encoder", r"of encode for a image with num_embeds", model=SwapsItems),
    "encoder of another dtype": Fault(
        "other-dtypes", r"torch.float32 of encode in a model that runs in torch.bfloat16", model=GivesDoubles
    ),
    "encoder does not look": Fault("order", r"the same answer for a image in other colours", model=LooksAway),
    "positions of the step": Fault("chunked", r"in chunks of 1, token", model=RemembersTheStep),
    "head over the batch": Fault(
        "head", r"logits of a row that are .* off beside others", model=HeadOverTheBatch
    ),
    "a config field not read": Fault("config-fields", r"rms_norm_eps of config.json", model=IgnoresEps),
    "num_embeds one too many": Fault("encoder", r"num_embeds 25; expected \(25, 64\)", mapper=CountsOneMore),
    "count_embeds wrong": Fault("mapper-sizes", r"from count_embeds and .* from map", mapper=Forecasts),
    "pixels changed": Fault("mapper-types", r"assignment destination is read-only", mapper=Spoils),
    "a shared buffer": Fault(
        "mapper-repeats", r"with another tensors\['pixel_values'\]", mapper=KeepsABuffer
    ),
    "grid of embeddings lost": Fault("embeddings", r"with embeddings, token", mapper=ForgetsTheGrid),
    "map crashes": Fault("mapper-sizes", r"IndexError: .* from map of a image of 1x1", mapper=Crashes),
    "expansion too short": Fault(
        "placeholder", r"23 is_embed with 23 set, and num_embeds 24", placeholder=one_token_less
    ),
    "template without pictures": Fault(
        "chat",
        r"placeholder",
        settings={
            "chat_template": "{{ messages[0]['content'][-1]['text'] }}",
            "chat_template_content_format": "openai",
        },
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint without a chat template of its own."""
    for file in FOLDER.iterdir():
        if file.name not in ("chat_template.json", "chat_template.jinja"):
            (tmp_path / file.name).symlink_to(file)
    return tmp_path


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_mistake_is_named(fault: Fault, folder: Path) -> None:
    with (
        ModelUnderTest(folder, plugins=fault.plugins(), num_requests=6, **fault.settings) as model,
        pytest.raises(CheckFailed, match=fault.message) as caught,
    ):
        check_model(CHECKS[fault.check], model)
    assert caught.value.got
    assert caught.value.expected
    assert caught.value.look_at
    print(f"{fault.check}: {caught.value}")


def test_without_a_mistake_these_checks_pass(folder: Path) -> None:
    names = {fault.check for fault in FAULTS.values()} - {"config-fields"}
    with ModelUnderTest(folder, plugins=Fault("", "").plugins(), num_requests=6) as model:
        for name in names:
            assert check_model(CHECKS[name], model).applies


# ---- what only another implementation knows -------------------------------------------------------


class HalfPixels(Qwen2VL):
    """A consistent mistake: everything agrees with itself."""

    def encode(self, modality: str, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        return [rows * 0.5 for rows in super().encode(modality, items)]


def all_the_same(right: Positions, media: Sequence[Any]) -> Positions:
    """Pictures counted as text is."""
    length = right.prompt.shape[1]
    return Positions(prompt=np.tile(np.arange(length, dtype=np.int64), (3, 1)))


ALONE = {
    "encoder scaled": (Fault("", "case 2: log-probabilities .* the encoder's output", model=HalfPixels)),
    "positions of pictures as of text": (Fault("", "case 2: log-probabilities", positions=all_the_same)),
    "one token less in the prompt": Fault(
        "", "case 2: the error RequestError: the encoder gave", mapper=CountsOneMore
    ),
}


@pytest.mark.parametrize("fault", ALONE.values(), ids=ALONE)
def test_a_consistent_mistake_is_seen_beside_transformers(fault: Fault) -> None:
    with pytest.raises(CheckFailed, match=fault.message) as caught:
        compare_with_transformers(FOLDER, their_cases(), inputs=their_inputs(), plugins=fault.plugins())
    print(caught.value)


def test_without_a_mistake_it_is_transformers() -> None:
    found = compare_with_transformers(
        FOLDER, their_cases(), inputs=their_inputs(), plugins=Fault("", "").plugins()
    )
    assert [comparison.tokens for comparison in found] == [8, 8]


def their_cases() -> list[ModelCase]:
    mark = f"<|vision_start|>{PAD}<|vision_end|>"
    return [ModelCase(text="Hello"), ModelCase(text=f"{mark} what is it?", images=make_images()[:1])]


def their_inputs() -> Callable[[ModelCase], Mapping[str, Any]]:
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

    def inputs(case: ModelCase) -> Mapping[str, Any]:
        found = dict(images(images=list(case.images), return_tensors="pt")) if case.images else {}
        count = sum(int(grid.prod()) // 4 for grid in found.get("image_grid_thw", ()))
        ids = torch.tensor([tokenizer.encode(case.text.replace(PAD, PAD * count))])
        kinds = (ids == tokenizer.convert_tokens_to_ids(PAD)).long()
        return {**found, "input_ids": ids, "mm_token_type_ids": kinds}

    return inputs
