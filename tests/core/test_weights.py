"""Checkpoint tensors into layers: fusing, casting, slices of ranks, and an account of every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opsin.api import BuildContext, Parallel
from opsin.checkpoint.weights import load_weights, model_slots, read_safetensors
from opsin.errors import CheckpointError
from opsin.kernels import Kernels
from opsin.layers import Embedding, Linear, RMSNorm


def context(**changes: Any) -> BuildContext:
    return BuildContext(**{"config": {}, "kernels": Kernels(), "dtype": torch.float32, **changes})


class Small(nn.Module):
    """A model with one layer of each kind."""

    def __init__(self, context: BuildContext, *, tied: bool = True) -> None:
        super().__init__()
        head = Linear(context, 4, 10, bias=False)
        self.block = nn.Module()
        self.block.qkv_proj = Linear(context, 4, {"q_proj": 4, "k_proj": 2, "v_proj": 2}, bias=True)
        self.block.conv = Linear(context, 12, 5, bias=False, stored_shape=(5, 3, 2, 2))
        self.norm = RMSNorm(context, 4, 1e-6)
        self.embed = Embedding(context, 10, 4, tied=head if tied else None)
        self.head = [head]

    def weight_name(self, key: str) -> str | None:
        return None if key.endswith("inv_freq") else key.removeprefix("model.")


def tensors() -> dict[str, Tensor]:
    shapes = {
        "model.block.q_proj.weight": (4, 4),
        "model.block.k_proj.weight": (2, 4),
        "model.block.v_proj.weight": (2, 4),
        "model.block.q_proj.bias": (4,),
        "model.block.k_proj.bias": (2,),
        "model.block.v_proj.bias": (2,),
        "model.block.conv.weight": (5, 3, 2, 2),
        "model.norm.weight": (4,),
        "model.embed.weight": (10, 4),
        "model.rotary.inv_freq": (2,),
    }
    random = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}


def loaded(given: dict[str, Tensor], **changes: Any) -> tuple[Small, Any]:
    model = Small(context(**changes))
    return model, load_weights(model, given.items())  # type: ignore[arg-type]


def test_every_key_goes_where_it_belongs() -> None:
    given = tensors()
    model, report = loaded(given)
    report.check()
    assert report.ignored == ["model.rotary.inv_freq"]
    x = torch.randn(3, 4)
    fused = torch.cat([x @ given[f"model.block.{p}_proj.weight"].T for p in "qkv"], dim=-1)
    fused += torch.cat([given[f"model.block.{p}_proj.bias"] for p in "qkv"])
    assert torch.allclose(model.block.qkv_proj(x), fused, atol=1e-6)
    patches = torch.randn(2, 3, 2, 2)
    convolved = nn.functional.conv2d(patches, given["model.block.conv.weight"]).flatten(1)
    assert torch.allclose(model.block.conv(patches.flatten(1)), convolved, atol=1e-6)
    assert torch.equal(model.embed(torch.tensor([3])), given["model.embed.weight"][3:4])
    assert torch.allclose(model.head[0](x), x @ given["model.embed.weight"].T, atol=1e-6), "a tied head"


def test_weights_are_cast_on_the_way() -> None:
    model, _ = loaded(tensors(), dtype=torch.bfloat16)
    assert model.embed.weight is not None
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.block.qkv_proj(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_missing_and_unexpected_keys_are_named() -> None:
    given = tensors()
    del given["model.block.k_proj.bias"]
    given["model.extra.weight"] = torch.zeros(1)
    _, report = loaded(given)
    with pytest.raises(CheckpointError, match=r"1 missing \(block.k_proj.bias\); 1 unexpected \(model.extra"):
        report.check()


def test_a_wrong_shape_is_named() -> None:
    given = {**tensors(), "model.norm.weight": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \(5,\).*\(4,\)"):
        loaded(given)


def test_building_allocates_nothing() -> None:
    huge = Linear(context(), 2**20, 2**20, bias=True)
    assert [slot.shape for slot in huge.slots()] == [(2**20, 2**20), (2**20,)]


@pytest.mark.parametrize("split", ["column", "row"])
def test_ranks_hold_slices_that_add_up(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x)  # the ranks are added up below
    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(3, 4)
    results = []
    for rank in range(2):
        parts: Any = {"a": 4, "b": 2} if split == "column" else 6
        layer = Linear(context(parallel=Parallel(rank=rank, world_size=2)), 4, parts, bias=True, split=split)
        by_name = {slot.name: slot for slot in layer.slots()}
        if split == "column":
            for name, rows in (("a", slice(0, 4)), ("b", slice(4, 6))):
                by_name[f"{name}.weight"].put(weight[rows])
                by_name[f"{name}.bias"].put(bias[rows])
            results.append(layer(x))
        else:
            by_name["weight"].put(weight)
            by_name["bias"].put(bias)
            results.append(layer(x[:, 2 * rank : 2 * rank + 2]))
    whole = x @ weight.T + bias
    if split == "row":
        assert torch.allclose(results[0] + results[1], whole, atol=1e-6)
    else:
        expected = [torch.cat([whole[:, 2 * r : 2 * r + 2], whole[:, 4 + r : 5 + r]], -1) for r in range(2)]
        assert all(torch.allclose(given, wanted, atol=1e-6) for given, wanted in zip(results, expected))


def test_files_are_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "2.safetensors")
    stream = read_safetensors([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert [(key, len(tensor)) for key, tensor in stream] == [("a", 2), ("b", 3)]


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all", b"\xff" * 64])
def test_damaged_files_are_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        list(read_safetensors([tmp_path / "model.safetensors"]))


def test_slots_of_a_model_are_its_checkpoint_keys() -> None:
    assert {f"model.{name}" for name in model_slots(Small(context()))} == set(tensors()) - {
        "model.rotary.inv_freq"
    }
