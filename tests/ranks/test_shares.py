"""The arithmetic of tensor parallelism: parts of dimensions, of layers, of a machine's cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opsin import kernels
from opsin.api import BuildContext, KernelSpec, LinearFn, Parallel, QuantizedWeight, Rounding, WeightForm
from opsin.errors import ConfigError
from opsin.kernels import Kernels
from opsin.layers import DecoderConfig, Linear, kv_geometry
from opsin.layers.decoder import Attention, GatedMLP
from opsin.layers.rounding import round_weight
from opsin.rank.placement import divide
from opsin.rank.step import deal

worlds = st.integers(1, 9)


@given(world=worlds, units=st.integers(1, 40), unit=st.integers(1, 130))
def test_shares_are_whole_units_and_cover_a_dimension_once(world: int, units: int, unit: int) -> None:
    shares = [Parallel(rank=rank, world_size=world).share(units * unit, unit) for rank in range(world)]
    assert all(first % unit == length % unit == 0 < length for first, length in shares)
    if units >= world:
        covered = [row for first, length in shares for row in range(first, first + length)]
        assert covered == list(range(units * unit))
        lengths = {length for _, length in shares}
        assert max(lengths) - min(lengths) in (0, unit)
    else:  # several ranks have the same unit, as evenly as can be
        times = [sum(first == unit * index for first, _ in shares) for index in range(units)]
        assert sum(times) == world
        assert max(times) - min(times) <= 1
    assert Parallel(world_size=world).shares(units * unit, unit) == [length for _, length in shares]


def test_units_must_divide() -> None:
    with pytest.raises(ValueError, match="units of 3 do not divide 10"):
        Parallel().share(10, 3)


def decoder_config(heads: int, kv_heads: int, wide: int = 128, *, fused: bool = False) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=wide,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=4,
        eps=1e-6,
        fused=fused,
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "possible"),
    [
        (12, 2, {1, 2, 4, 6, 12}),
        (28, 4, {1, 2, 4, 28}),
        (64, 8, {1, 2, 4, 8, 16, 32, 64}),
        (36, 36, {1, 2, 3, 4, 6, 9, 12, 18, 36}),
    ],
)
def test_numbers_of_ranks(heads: int, kv_heads: int, possible: set[int]) -> None:
    """A key/value head may be on several ranks; a query head is on one, with the head that it reads."""
    config = decoder_config(heads, kv_heads)
    for world in set(range(1, heads + 2)) - possible:
        with pytest.raises(ConfigError, match="possible are 1, "):
            kv_geometry(config, world)
    for world in possible:
        geometry = kv_geometry(config, world)
        for rank in range(world):
            place = Parallel(rank=rank, world_size=world)
            (first, count), (first_kv, count_kv) = place.share(heads), place.share(kv_heads)
            assert geometry.num_kv_heads == count_kv
            read = {head * kv_heads // heads for head in range(first, first + count)}
            assert read == set(range(first_kv, first_kv + count_kv))


def build(rank: int, world: int) -> BuildContext:
    place = Parallel(rank=rank, world_size=world)
    return BuildContext(config={}, kernels=Kernels(), dtype=torch.float32, parallel=place)


def fill(module: torch.nn.Module, weights: Mapping[str, Tensor | QuantizedWeight]) -> None:
    for path, layer in module.named_modules():
        if isinstance(layer, Linear):
            for slot in layer.slots():
                weight = weights[slot.name if slot.beside else f"{path}.{slot.name}"]
                assert tuple(weight.shape) == slot.shape
                if isinstance(weight, Tensor):
                    slot.put(weight)
                else:
                    assert slot.put_quantized is not None
                    slot.put_quantized(weight)


def mlp_weights(wide: int, *, fused: bool) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(shape, generator=random) for shape in ((wide, 32), (wide, 32), (32, wide)))
    if fused:
        return {"gate_up_proj.weight": torch.cat([gate, up]), "down_proj.weight": down}
    return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}


class _Kept:
    """Stands for the sum over ranks: keeps each rank's part."""

    def __call__(self, x: Tensor, place: Parallel) -> Tensor:
        return x


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("wide", [128 * 5, 112, 6])
def test_an_mlp_is_the_sum_of_its_parts(
    world: int, wide: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = decoder_config(4, 4, wide, fused=fused), mlp_weights(wide, fused=fused)
    monkeypatch.setattr(Kernels, "all_reduce", lambda *_: _Kept())
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    parts = []
    for rank in range(-1, world):
        mlp = GatedMLP(build(max(rank, 0), 1 if rank < 0 else world), config)
        fill(mlp, weights)
        parts.append(mlp(x))
    torch.testing.assert_close(sum(parts[1:]), parts[0], rtol=1e-4, atol=1e-3)


FORMS = [
    WeightForm(kind="int8"),
    WeightForm(kind="int8", group_size=128),
    WeightForm(kind="int4", group_size=32),
    WeightForm(kind="int4", group_size=128),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_quantised_parts_are_the_whole_ones_codes(form: WeightForm, fused: bool) -> None:
    """At 5 x 128 columns and 2 ranks, each rank reads the codes that one rank reads."""
    config, weights = decoder_config(4, 4, 640, fused=fused), mlp_weights(640, fused=fused)

    def rounded(weight: Tensor) -> QuantizedWeight:  # 32 inputs hold no group of 128
        group = form.group_size and min(form.group_size, weight.shape[1])
        return round_weight(weight, WeightForm(kind=form.kind, group_size=group))

    wide = {name: rounded(weight) for name, weight in weights.items()}
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernels, "all_reduce", lambda *_: _Kept())
        parts = []
        for rank in range(-1, 2):
            mlp = GatedMLP(build(max(rank, 0), 1 if rank < 0 else 2), config)
            fill(mlp, wide)
            parts.append(mlp(x))
    torch.testing.assert_close(parts[1] + parts[2], parts[0], rtol=1e-4, atol=1e-3)


def test_rounded_at_load_has_the_codes_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 has a scale for all of a row: a rank with half of the columns must not find one of its own."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 40] *= 20
    seen: list[QuantizedWeight] = []

    def prepare(given: QuantizedWeight, *args: Any, **options: Any) -> LinearFn:
        seen.append(given)
        return kernels.prepare_quantized_linear(given, *args, **options)

    spec = KernelSpec(device="host", op="prepare_quantized_linear", load=lambda: prepare)
    monkeypatch.setattr(Kernels, "all_reduce", lambda *_: _Kept())
    form = WeightForm(kind="int8")
    for rank in range(2):
        context = replace(build(rank, 2), kernels=Kernels("host", [spec]), rounding=Rounding(other=form))
        [slot] = Linear(context, 64, 8, bias=False, split="row").slots()
        slot.put(weight)
    whole = round_weight(weight, form)
    assert torch.equal(torch.cat([part.codes for part in seen], 1), whole.codes)
    assert all(torch.equal(part.scales, whole.scales) for part in seen)


def test_an_activation_before_the_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="applies no activation"):
        Linear(build(0, 2), 8, 8, bias=False, split="row", activation="silu")


def test_key_value_heads_on_several_ranks_are_read_by_their_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    config = decoder_config(8, 2)
    monkeypatch.setattr(Kernels, "all_reduce", lambda *_: _Kept())
    rows = {"q_proj": 32, "k_proj": 8, "v_proj": 8}
    for rank in range(4):
        layer = Attention(build(rank, 4), config).qkv_proj
        tags = {
            f"{name}.weight": torch.arange(n).float().view(n, 1).expand(n, 32) for name, n in rows.items()
        }
        fill(torch.nn.ModuleDict({"qkv_proj": layer}), tags)
        found = layer(torch.eye(32)[:1]).flatten().int().tolist()
        kv = list(range(4 * (rank // 2), 4 * (rank // 2) + 4))
        assert found == [*range(8 * rank, 8 * rank + 8), *kv, *kv]


def test_cores_are_divided_by_node_and_core() -> None:
    """Two nodes of two cores with two threads each, numbered as Linux does."""
    node_of = {0: 0, 1: 0, 2: 1, 3: 1, 4: 0, 5: 0, 6: 1, 7: 1}
    siblings = [frozenset({cpu % 4, cpu % 4 + 4}) for cpu in range(8)]
    by_two = divide(node_of, siblings, 2)
    assert [set(place.cpus) for place in by_two] == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    assert [place.nodes for place in by_two] == [(0,), (1,)]
    by_four = divide(node_of, siblings, 4)
    assert [set(place.cpus) for place in by_four] == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
    assert all(place.alone for place in by_four)
    by_five = divide(node_of, siblings, 5)
    assert not any(place.alone for place in by_five)
    assert str(by_five[4]) == "cores 0, 4 of NUMA node 0, shared with other ranks"
    limited = {cpu: node for cpu, node in node_of.items() if cpu in (1, 2)}
    assert [set(p.cpus) for p in divide(limited, [siblings[1], siblings[2]], 2)] == [{1}, {2}]


@given(sizes=st.lists(st.integers(1, 5000), max_size=40), world=worlds)
def test_media_are_dealt_evenly(sizes: list[int], world: int) -> None:
    dealt = deal(sizes, world)
    assert len(dealt) == world
    assert sorted(index for share in dealt for index in share) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0)
