"""Media through transformers' image processor: equal to what a family's own mapper gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opsin.api import InputContext, InputMapperSpec, MediaItem
from opsin.layers import ProcessorMapper
from opsin.plugins import load_plugins
from opsin.testing.models import ModelUnderTest, check_model, input_context, make_images, model_checks
from tests.models.golden import GOLDEN

FOLDER = GOLDEN / "qwen2vl" / "model"


def build(context: InputContext) -> ProcessorMapper:
    """Of a family whose processor gives grids."""

    def grid(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        [found] = tensors["image_grid_thw"].tolist()
        return tuple(found)

    return ProcessorMapper(
        context,
        lambda tensors: int(tensors["image_grid_thw"].prod()) // 4,
        geometry=grid,
        option_names=("min_pixels", "max_pixels"),
    )


def item(picture: Any) -> MediaItem:
    import numpy as np

    return MediaItem(modality="image", digest="0", pixels=np.asarray(picture))


@pytest.mark.parametrize("options", [{}, {"max_pixels": 28 * 28 * 12}], ids=str)
def test_it_gives_what_the_familys_own_mapper_gives(options: Mapping[str, Any]) -> None:
    context = input_context(FOLDER)
    own = load_plugins().input_mappers("Qwen2VLForConditionalGeneration")["image"].build(context)
    mapper = build(context)
    assert own is not None
    for picture in make_images():
        one, other = (each.map(item(picture), options) for each in (mapper, own))
        assert one.num_embeds == other.num_embeds
        assert one.geometry == other.geometry
        assert torch.equal(one.tensors["pixel_values"], other.tensors["pixel_values"])


def test_a_family_may_map_through_it() -> None:
    """The family of the recorded checkpoint with this mapper instead of its own passes what mappers must."""
    plugins = load_plugins()
    own = plugins.model("Qwen2VLForConditionalGeneration").architecture
    other = SimpleNamespace(
        opsin_register_input_mappers=_hook([InputMapperSpec(architecture=own, modality="image", build=build)])
    )
    prefer = {f"input_mapper:{own}/image": "hurried"}
    plugins = load_plugins(extra={"hurried": other}, prefer=prefer)
    names = ("mapper-types", "mapper-repeats", "placeholder", "positions", "encoder", "order", "batched")
    with ModelUnderTest(FOLDER, plugins=plugins) as model:
        assert isinstance(model.frontend.processor.mappers["image"], ProcessorMapper)
        for check in model_checks():
            if check.name in names:
                assert check_model(check, model).applies


def _hook(specs: Any) -> Any:
    from opsin import hookimpl

    return hookimpl(lambda: specs, specname="opsin_register_input_mappers")


def test_embeddings_are_items_of_their_own() -> None:
    mapper = build(input_context(FOLDER))
    parts = mapper.split_embeds([torch.zeros(4, 8), torch.zeros(6, 8)])
    mapped = [mapper.map(MediaItem(modality="image", digest="0", embeds=part), {}) for part in parts]
    assert [each.num_embeds for each in mapped] == [4, 6]


def test_a_checkpoint_without_a_processor_says_so(tmp_path: Path) -> None:
    context = InputContext(config={}, preprocessor={}, tokenizer=input_context(FOLDER).tokenizer)
    with pytest.raises(ValueError, match="no checkpoint"):
        build(context)
    for file in FOLDER.iterdir():
        if file.name not in ("preprocessor_config.json", "processor_config.json"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="image processor in .* cannot be loaded"):
        build(input_context(tmp_path))
