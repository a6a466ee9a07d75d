"""The vision tower against transformers' CLIP and SigLIP, and what must hold of any tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from opsin.api import BuildContext
from opsin.checkpoint.weights import model_slots
from opsin.kernels import Kernels
from opsin.layers import VisionConfig, VisionTransformer, flatten_patches

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "image_size": 70,
    "patch_size": 14,
}
SIDE = 5
CONTEXT = BuildContext(config={}, kernels=Kernels(), dtype=torch.float32)
TOWERS = ["clip", "siglip"]


def theirs(kind: str) -> Any:
    """transformers' tower with weights far enough from zero to tell layers apart."""
    torch.manual_seed(3)
    if kind == "clip":
        config: Any = CLIPVisionConfig(**SIZES, attn_implementation="eager")
        model: Any = CLIPVisionModel(config)
    else:
        config = SiglipVisionConfig(**SIZES, attn_implementation="eager")
        model = SiglipVisionModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def ours(reference: Any, *, num_layers: int, **settings: Any) -> VisionTransformer:
    """Our tower with the reference's weights, as deep as asked for."""
    config = VisionConfig.from_config(reference.config.to_dict(), num_layers=num_layers)
    tower = VisionTransformer(CONTEXT, config, **settings)
    slots = model_slots(tower)
    for key, tensor in reference.state_dict().items():
        slot = slots.pop(key.removeprefix("vision_model."), None)
        if slot is not None:
            assert slot.shape == tuple(tensor.shape)
            slot.put(tensor)
    assert not slots
    return tower


def assert_alike(given: Tensor, expected: Tensor) -> None:
    """As close as float32 sums in another order are; values here are of the order of 10."""
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=5e-5)


def pictures(count: int) -> Tensor:
    side = SIZES["image_size"]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(4))


@torch.inference_mode()
@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("num_layers", [0, 1, 3, 4])
def test_states_after_each_layer_are_transformers(kind: str, num_layers: int) -> None:
    reference = theirs(kind)
    pixels = pictures(3)
    expected = reference(pixels, output_hidden_states=True).hidden_states[num_layers]
    tower = ours(reference, num_layers=num_layers, post_norm=False)
    given = tower(flatten_patches(pixels, SIZES["patch_size"]), [SIDE**2] * 3)
    assert_alike(given.view_as(expected), expected)


@torch.inference_mode()
@pytest.mark.parametrize("kind", TOWERS)
def test_several_states_stand_side_by_side(kind: str) -> None:
    reference = theirs(kind)
    pixels = pictures(2)
    states = reference(pixels, output_hidden_states=True).hidden_states
    tower = ours(reference, num_layers=3, post_norm=False, read_after=[3, 0, 2])
    given = tower(flatten_patches(pixels, SIZES["patch_size"]), [SIDE**2] * 2)
    expected = torch.cat([states[3], states[0], states[2]], -1)
    assert_alike(given.view_as(expected), expected)


@torch.inference_mode()
def test_post_norm_is_transformers_last_state() -> None:
    reference = theirs("siglip")
    pixels = pictures(2)
    expected = reference(pixels).last_hidden_state
    tower = ours(reference, num_layers=4, post_norm=True)
    given = tower(flatten_patches(pixels, SIZES["patch_size"]), [SIDE**2] * 2)
    assert_alike(given.view_as(expected), expected)


@torch.inference_mode()
@pytest.mark.parametrize("kind", TOWERS)
def test_images_of_other_sizes_in_the_batch_change_nothing(kind: str) -> None:
    tower = ours(theirs(kind), num_layers=3, post_norm=False)
    patches = flatten_patches(pictures(3), SIZES["patch_size"])
    lengths = [25, 7, 12]
    positions = torch.cat(
        [torch.randperm(25, generator=torch.Generator().manual_seed(n))[:n] for n in lengths]
    )
    together = tower(patches[: sum(lengths)], lengths, positions)
    extra = 1 if kind == "clip" else 0
    alone = torch.cat(
        [
            tower(part, [len(part)], where)
            for part, where in zip(patches[: sum(lengths)].split(lengths), positions.split(lengths))
        ]
    )
    assert together.shape == (sum(lengths) + 3 * extra, SIZES["hidden_size"])
    assert_alike(together, alone)


@torch.inference_mode()
@pytest.mark.parametrize("kind", TOWERS)
def test_positions_are_rows_of_the_table(kind: str) -> None:
    tower = ours(theirs(kind), num_layers=2, post_norm=False)
    patches = flatten_patches(pictures(1), SIZES["patch_size"])
    straight = tower(patches, [25], torch.arange(25))
    assert torch.equal(straight, tower(patches, [25]))
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    extra = 1 if kind == "clip" else 0
    shuffled = tower(patches[order], [25], order)
    assert_alike(shuffled[extra:], straight[extra:][order])
    assert float((tower(patches[order], [25])[extra:] - straight[extra:][order]).abs().max()) > 1e-2


def test_patches_are_the_convolutions_columns() -> None:
    pixels = pictures(2)[:, :, :65, :44]
    weight = torch.randn(6, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.conv2d(pixels, weight, stride=14)
    given = flatten_patches(pixels, 14) @ weight.flatten(1).t()
    assert expected.shape[2:] == (4, 3)
    assert torch.allclose(given.view(2, 4, 3, 6).permute(0, 3, 1, 2), expected, atol=1e-4)


@pytest.mark.parametrize("read_after", [[], [5], [-1]])
def test_states_that_are_not_there_are_refused(read_after: list[int]) -> None:
    config = VisionConfig.from_config({**SIZES, "model_type": "clip_vision_model"})
    with pytest.raises(ValueError, match="read_after"):
        VisionTransformer(CONTEXT, config, post_norm=False, read_after=read_after)


def test_defaults_are_those_of_transformers() -> None:
    for kind, config in (
        ("clip_vision_model", CLIPVisionConfig()),
        ("siglip_vision_model", SiglipVisionConfig()),
    ):
        ours_found = VisionConfig.from_config({"model_type": kind})
        assert ours_found == VisionConfig.from_config(config.to_dict())
