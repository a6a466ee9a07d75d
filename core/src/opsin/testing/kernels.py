"""PUBLIC: the contract of the op table. A device plugin runs it on its kernels:

    DEVICE = open_device(0)
    SPECS = opsin_register_kernels()

    @pytest.mark.parametrize("case", kernel_cases(DEVICE.capabilities.dtypes), ids=str)
    def test_kernel(case):
        assert check_kernel(case, DEVICE, SPECS).provider == "mydevice"

Every case draws inputs from a seed of its own, computes the result with the reference in float32 on the
host, and compares the device's with it. Kernels are handed what layers may hand to them: views with strides
(parts of a fused projection), blocks in any order, cache slots that were never written. Those hold a number
that changes the result if it is let through; in the cases whose names end in ``-nan`` they hold NaN, which a
kernel lets through that loads whole blocks and multiplies what it should not see by zero.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, product

import torch
from torch import Tensor

from opsin import kernels as reference
from opsin.api import (
    Activation,
    AttentionBatch,
    Device,
    KernelQuery,
    KernelSpec,
    KVGeometry,
    KVLayer,
    LinearFn,
    OpName,
    QuantizedWeight,
    WeightForm,
)
from opsin.kernels import Choice, Kernels, allocate_kv
from opsin.layers.rounding import pack_halves, round_weight
from opsin.testing.exchanges import exchange_cases

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error, relative to the largest magnitude of the expected result."""

NAN_CASE = "-nan"
"""Ends the names of cases whose unwritten cache slots hold NaN. Since 1.2."""

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "quick_gelu")


@dataclass(frozen=True)
class KernelCase:
    """One thing a kernel must do. Its string is its name, stable across runs."""

    name: str
    query: KernelQuery
    check: Callable[[Bench], None] = field(repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class KernelOutcome:
    """A case that passed.

    Attributes:
        provider: who served it: the device's name, or ``"reference"`` if its specs decline it.
        worst: the largest error, as a share of the allowed one.
    """

    provider: str
    worst: float


class Bench:
    """A device under test, with inputs that depend on the case's name only.

    Attributes:
        worst: the largest error so far, as a share of the allowed one.
    """

    def __init__(self, case: KernelCase, device: Device, kernels: Kernels) -> None:
        self.device, self.kernels, self.query = device, kernels, case.query
        self.dtype: torch.dtype = getattr(torch, case.query.dtype)
        self.worst = 0.0
        self._generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers that the run dtype holds exactly, as float32 on the host."""
        drawn = torch.randn(shape, generator=self._generator) * scale
        return drawn.to(self.dtype).float()

    def shuffled(self, count: int) -> list[int]:
        """0 .. count - 1 in some order."""
        order: list[int] = torch.randperm(count, generator=self._generator).tolist()
        return order

    def put(self, x: Tensor) -> Tensor:
        """A compact copy on the device, in the run dtype."""
        return x.to(self.dtype, copy=True).to(self.device.torch_device)

    def fused(self, *parts: Tensor) -> list[Tensor]:
        """(T, heads, D) tensors on the device as a fused projection leaves them: views into its rows."""
        rows = self.put(torch.cat([part.flatten(1) for part in parts], dim=-1))
        sizes = [part.shape[1] * part.shape[2] for part in parts]
        views = rows.split(sizes, dim=-1)
        return [view.unflatten(-1, part.shape[1:]) for view, part in zip(views, parts)]

    def compare(self, got: Tensor, expected: Tensor, what: str) -> None:
        """Compare ``got``, on the device in the run dtype, with ``expected``, float32 on the host.

        Raises:
            AssertionError: they differ; ``what`` names them in the message.
        """
        assert got.dtype == self.dtype, f"{what}: got {got.dtype}, expected {self.dtype}"
        assert got.shape == expected.shape, (
            f"{what}: got {tuple(got.shape)}, expected {tuple(expected.shape)}"
        )
        largest = expected.abs().max().item() if expected.numel() else 0.0
        own = self.device.capabilities.tolerances.get(self.query.dtype, 0.0)
        limit = max(TOLERANCE[self.dtype], own) * max(1.0, largest)
        given = got.to("cpu").float()
        torch.testing.assert_close(given, expected, rtol=0.0, atol=limit, msg=lambda text: f"{what}: {text}")
        if expected.numel():
            self.worst = max(self.worst, (given - expected).abs().max().item() / limit)


WEIGHT_FORMS: Sequence[WeightForm] = (
    WeightForm(kind="bfloat16"),
    WeightForm(kind="float16"),
    WeightForm(kind="int8"),
    WeightForm(kind="int8", round_activations=True),
    WeightForm(kind="int8", group_size=64),
    WeightForm(kind="int8", group_size=64, round_activations=True),
    WeightForm(kind="int8", group_size=32, zero_points=True),
    WeightForm(kind="int4", group_size=32),
    WeightForm(kind="int4", group_size=32, round_activations=True),
    WeightForm(kind="int4", group_size=128, zero_points=True),
    WeightForm(kind="int4", group_size=128, zero_points=True, round_activations=True),
    WeightForm(kind="int4"),
    WeightForm(kind="table4", group_size=64),
)
"""The forms of weights in which linear layers are examined."""

ROUNDED_ACTIVATIONS_ERROR = 0.02
"""Largest error of a row where activations may be rounded to 8 bits: its norm, relative to the result's."""


def kernel_cases(
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    *,
    later_ops: bool = False,
    weights: Sequence[WeightForm] = (),
) -> list[KernelCase]:
    """All cases, for each of a device's dtypes.

    Args:
        dtypes: of the device.
        later_ops: with the ops added since API 1.0 (top_k, rotary_paged_attention, all_reduce, all_gather),
            which plugins of that time do not have.
        weights: also linear layers over weights in these forms, of `WEIGHT_FORMS` or others. Since 1.2.
    """
    makers = [_norms, _gated_acts, _rotaries, _linears, _paged_attentions, _dense_attentions]
    if later_ops:
        makers += [_top_ks, _rotary_paged_attentions, _exchanges]
    makers += [partial(formed_linears, form) for form in weights]
    return [case for dtype in dtypes for maker in makers for case in maker(dtype)]


def check_kernel(case: KernelCase, device: Device, specs: Sequence[KernelSpec]) -> KernelOutcome:
    """Run one case.

    Args:
        case: from `kernel_cases`.
        device: an opened device.
        specs: its kernels.

    Returns:
        Who served the case, and how well. A plugin's tests compare the provider with the expected one, so
        that a kernel that declines does not go unnoticed.

    Raises:
        AssertionError: the result is wrong; the message says where.
    """
    kernels = Kernels(device.name, specs)
    with torch.inference_mode():
        bench = Bench(case, device, kernels)
        case.check(bench)
        if device.synchronize is not None:
            device.synchronize()
    providers = {choice.provider for choice in kernels.choices}
    in_a_row = case.query.op == "rotary_paged_attention"  # a device without it has bound the three ops
    assert in_a_row or kernels.choices[Choice(case.query.op, next(iter(providers)))], case
    return KernelOutcome(providers.pop(), bench.worst)


# ---- Norms, activations, rotary ------------------------------------------------------------------


def _norms(dtype: str) -> Iterator[KernelCase]:
    shapes: list[tuple[int, ...]] = list(product((1, 2, 33), (8, 96, 896)))
    for shape, residual in product(shapes, (False, True)):
        query = KernelQuery(op="rms_norm", dtype=dtype, size=shape[-1])
        name = f"rms_norm-{dtype}-{_by(shape)}{'-residual' if residual else ''}"
        yield KernelCase(name, query, partial(_check_rms_norm, shape=shape, residual=residual))
    for shape, bias in [*product(shapes, (False, True)), ((2, 5, 24), True)]:
        query = KernelQuery(op="layer_norm", dtype=dtype, size=shape[-1], bias=bias)
        name = f"layer_norm-{dtype}-{_by(shape)}{'-bias' if bias else ''}"
        yield KernelCase(name, query, partial(_check_layer_norm, shape=shape, bias=bias))


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _check_rms_norm(bench: Bench, *, shape: Sequence[int], residual: bool) -> None:
    x, weight = bench.draw(*shape, scale=3.0), bench.draw(shape[-1])
    before = bench.draw(*shape) if residual else None
    expected = reference.rms_norm(x, weight, 1e-6, before)
    put_before = None if before is None else bench.put(before)
    got = bench.kernels.rms_norm(bench.query)(bench.put(x), bench.put(weight), 1e-6, put_before)
    bench.compare(got[0], expected[0], "normed")
    bench.compare(got[1], expected[1], "residual stream")


def _check_layer_norm(bench: Bench, *, shape: Sequence[int], bias: bool) -> None:
    x, weight = bench.draw(*shape, scale=3.0) + 1, bench.draw(shape[-1])
    x = x.to(bench.dtype).float()
    shift = bench.draw(shape[-1]) if bias else None
    expected = reference.layer_norm(x, weight, shift, 1e-5)
    put_shift = None if shift is None else bench.put(shift)
    got = bench.kernels.layer_norm(bench.query)(bench.put(x), bench.put(weight), put_shift, 1e-5)
    bench.compare(got, expected, "normed")


def _gated_acts(dtype: str) -> Iterator[KernelCase]:
    for rows, size, activation in product((1, 3, 40), (16, 344), ACTIVATIONS):
        query = KernelQuery(op="gated_act", dtype=dtype, size=size, activation=activation)
        check = partial(_check_gated_act, rows=rows, size=size, activation=activation)
        yield KernelCase(f"gated_act-{dtype}-{rows}x{size}-{activation}", query, check)


def _check_gated_act(bench: Bench, *, rows: int, size: int, activation: Activation) -> None:
    x = bench.draw(rows, 2 * size, scale=2.0)
    got = bench.kernels.gated_act(bench.query)(bench.put(x), activation)
    bench.compare(got, reference.gated_act(x, activation), "gated")


def _rotaries(dtype: str) -> Iterator[KernelCase]:
    heads = ((4, 4, 16, 16), (14, 2, 64, 64), (8, 4, 72, 72), (4, 1, 80, 80), (3, 3, 96, 96), (8, 2, 128, 64))
    for rows, (*geometry, width) in product((1, 2, 19), heads):
        query = _attention_query("rotary", dtype, *geometry)
        num_heads, num_kv_heads, head_size = geometry
        name = f"rotary-{dtype}-{rows}x{num_heads}:{num_kv_heads}x{head_size}-of-{width}"
        yield KernelCase(name, query, partial(_check_rotary, rows=rows, geometry=geometry, width=width))


def _check_rotary(bench: Bench, *, rows: int, geometry: Sequence[int], width: int) -> None:
    heads, kv_heads, size = geometry
    q, k, v = (bench.draw(rows, n, size) for n in (heads, kv_heads, kv_heads))
    angles = torch.rand(rows, width // 2, generator=torch.Generator().manual_seed(rows)) * 100
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    expected_q, expected_k = reference.rotary(q, k, cos, sin)
    put_q, put_k, put_v = bench.fused(q, k, v)
    tables = [table.to(bench.device.torch_device) for table in (cos, sin)]
    got_q, got_k = bench.kernels.rotary(bench.query)(put_q, put_k, *tables)
    bench.compare(got_q, expected_q, "q")
    bench.compare(got_k, expected_k, "k")
    bench.compare(put_v, v, "v, which is next to q and k in memory")


def _attention_query(op: OpName, dtype: str, heads: int, kv_heads: int, head_size: int) -> KernelQuery:
    return KernelQuery(op=op, dtype=dtype, num_heads=heads, num_kv_heads=kv_heads, head_size=head_size)


# ---- Linear layers -------------------------------------------------------------------------------


def _linears(dtype: str) -> Iterator[KernelCase]:
    small, large = (24, 40), (640, 896)
    for size, rows, keep, bias in product(
        (small, large), (0, 1, 2, 3, 4, 17, 70), (False, True), (False, True)
    ):
        yield _linear(dtype, size, (rows, size[0]), bias, None, keep)
    for size, bias, activation, rows, keep in product(
        (small, large), (False, True), ACTIVATIONS, (1, 9), (False, True)
    ):
        yield _linear(dtype, size, (rows, size[0]), bias, activation, keep)
    for shape, decodes in product(((2, 5, 640), (640,)), (False, True)):
        yield _linear(dtype, large, shape, True, "gelu", False, decodes)
    if dtype == "float32":
        for rows, bias, keep in product((0, 1, 2, 8, 17, 33, 70), (False, True), (False, True)):
            yield _linear(dtype, large, (rows, 640), bias, None, keep, True)
        for activation in ACTIVATIONS:
            yield _linear(dtype, large, (3, 640), True, activation, False, True)


def _linear(
    dtype: str,
    size: tuple[int, int],
    shape: Sequence[int],
    bias: bool,
    activation: Activation | None,
    keep: bool,
    decodes: bool = False,
) -> KernelCase:
    """``decodes``: a decoder's layer, whose weights are bfloat16 numbers as those of most checkpoints are."""
    wide, out = size
    query = KernelQuery(
        op="prepare_linear", dtype=dtype, in_features=wide, out_features=out, activation=activation, bias=bias
    )
    marks = [mark for mark, there in (("bias", bias), ("kept", keep), ("decodes", decodes)) if there]
    name = "-".join(["linear", dtype, f"{_by(shape)}-to-{out}", *marks, *filter(None, [activation])])
    return KernelCase(name, query, partial(_check_linear, size=size, shape=shape, keep=keep, decodes=decodes))


def _check_linear(
    bench: Bench, *, size: tuple[int, int], shape: Sequence[int], keep: bool, decodes: bool
) -> None:
    query, (wide, out) = bench.query, size
    weight = bench.draw(out, wide, scale=wide**-0.5)
    if decodes:
        weight = weight.bfloat16().float()
    bias = bench.draw(out) if query.bias else None
    put_weight, put_bias = bench.put(weight), None if bias is None else bench.put(bias)
    linear = bench.kernels.prepare_linear(query)(
        put_weight, put_bias, query.activation, keep_weight=keep, few_rows=decodes
    )
    expected = reference.prepare_linear(weight, bias, query.activation, keep_weight=True)
    if keep:
        bench.compare(put_weight, weight, "the weight, which is also used elsewhere")
    for turn in ("first", "second"):
        x = bench.draw(*shape)
        put_x = bench.put(x)
        bench.compare(linear(put_x), expected(x), f"{turn} call")
        bench.compare(put_x, x, "the input, which is also used elsewhere")


def formed_linears(form: WeightForm, dtype: str) -> Iterator[KernelCase]:
    """Linear layers over a weight in a form; one of 16 bits is for layers that run in float32."""
    narrow = form.kind in ("float16", "bfloat16")
    if narrow and dtype != "float32":
        return
    for (wide, out), decodes in product(((128, 40), (640, 896), (896, 133)), (False, True)):
        shapes: list[tuple[int, ...]] = [(rows, wide) for rows in (0, 1, 2, 3, 4, 7, 16, 33, 70, 300)]
        for shape in [*shapes, (2, 5, wide), (wide,)]:
            rows = math.prod(shape[:-1])
            activation = ACTIVATIONS[rows % len(ACTIVATIONS)] if rows in (1, 16) else None
            query = KernelQuery(
                op="prepare_linear" if narrow else "prepare_quantized_linear",
                dtype=dtype,
                in_features=wide,
                out_features=out,
                activation=activation,
                bias=rows % 2 == 1,
                weight=form,
            )
            marks = [str(form).replace(" ", "_"), *["decodes"] * decodes, *filter(None, [activation])]
            name = "-".join(["linear", dtype, f"{_by(shape)}-to-{out}", *marks])
            yield KernelCase(name, query, partial(_check_formed, shape=shape, decodes=decodes))


def _check_formed(bench: Bench, *, shape: Sequence[int], decodes: bool) -> None:
    query = bench.query
    assert query.weight is not None
    assert query.in_features is not None
    assert query.out_features is not None
    drawn = bench.draw(query.out_features, query.in_features, scale=query.in_features**-0.5)
    bias = bench.draw(query.out_features) if query.bias else None
    put_bias = None if bias is None else bench.put(bias)
    linear, weight = _prepared(bench, drawn, put_bias, decodes)
    expected = reference.prepare_linear(weight, bias, query.activation, keep_weight=True)
    for turn in ("first", "second"):
        x = bench.draw(*shape)
        put_x = bench.put(x)
        got = linear(put_x)
        if query.weight.round_activations:
            _compare_rounded(bench, got, expected(x), f"{turn} call")
        else:
            bench.compare(got, expected(x), f"{turn} call")
        bench.compare(put_x, x, "the input, which is also used elsewhere")
    if len(shape) == 2 and shape[0] > 1:
        _check_neighbours(bench, linear, bench.draw(*shape))


def _prepared(bench: Bench, drawn: Tensor, bias: Tensor | None, decodes: bool) -> tuple[LinearFn, Tensor]:
    """The layer under test, and the weight it stands for, in float32 on the host."""
    query, target = bench.query, bench.device.torch_device
    assert query.weight is not None
    if query.op == "prepare_linear":
        stored = drawn.to(getattr(torch, query.weight.kind))
        prepare = bench.kernels.prepare_linear(query)
        run = prepare(stored.to(target), bias, query.activation, keep_weight=False, few_rows=decodes)
        return run, stored.float()
    weight = some_weight(drawn, query.weight)
    prepare_quantized = bench.kernels.prepare_quantized_linear(query)
    put = weight.to(target)
    run = prepare_quantized(put, bias, query.activation, keep_weight=False, few_rows=decodes)
    return run, weight.dequantize(torch.float32)


def some_weight(drawn: Tensor, form: WeightForm) -> QuantizedWeight:
    """A weight in a form: ``drawn`` (N, K) rounded, or made up of every code and zero point there is."""
    if not form.zero_points and form.kind in ("int8", "int4"):
        return round_weight(drawn, form)
    rows, wide = drawn.shape
    groups = 1 if form.group_size is None else wide // form.group_size
    spread = torch.arange(rows * wide).view(rows, wide) * 7 + (drawn * 1000).long()
    if form.kind == "int8":
        codes = (spread % 256 - 128).to(torch.int8)
    else:
        codes = pack_halves((spread % 16).to(torch.uint8))
    places = torch.arange(rows * groups).view(rows, groups)
    lowest, highest = (-128, 128) if form.kind == "int8" else (0, 16)
    zeros = (lowest + places * 5 % (highest - lowest + 1)).short() if form.zero_points else None
    table = torch.linspace(-1, 1, 16) ** 3 if form.kind == "table4" else None
    levels = {"int8": 128, "int4": 8}.get(form.kind, 1)
    scales = (1 + places % 3) / (2 * levels * wide**0.5)
    return QuantizedWeight(form=form, codes=codes, scales=scales, in_features=wide, zeros=zeros, table=table)


def _compare_rounded(bench: Bench, got: Tensor, expected: Tensor, what: str) -> None:
    """Each row's error, relative to its norm; the run dtype's own rounding comes on top."""
    assert got.dtype == bench.dtype, f"{what}: got {got.dtype}, expected {bench.dtype}"
    assert got.shape == expected.shape, f"{what}: got {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = (got.to("cpu").float() - expected).norm(dim=-1)
    limit = (ROUNDED_ACTIVATIONS_ERROR + TOLERANCE[bench.dtype]) * expected.norm(dim=-1)
    worst = (error / limit).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{what}: a row differs by {worst:.2f} of what rounding activations may cost"
    bench.worst = max(bench.worst, worst)


def _check_neighbours(bench: Bench, linear: LinearFn, x: Tensor) -> None:
    """A row's result stays what it is when the rows beside it grow."""
    before = linear(bench.put(x))[0].to("cpu").float()
    x[1:] *= 50
    after = linear(bench.put(x))[0].to("cpu").float()
    torch.testing.assert_close(
        after, before, rtol=1e-6, atol=1e-6, msg=lambda text: f"a row beside others 50 times larger: {text}"
    )


# ---- Attention -----------------------------------------------------------------------------------

# (query, key/value heads, head size)
_GEOMETRIES = ((4, 4, 16), (14, 2, 64), (6, 3, 72), (3, 3, 80), (4, 1, 96), (8, 2, 128))

# name -> (query length, context length) of each sequence of a step
_UNWRITTEN = 7.0
_NAN_STEPS = ("decode", "decode-uneven", "prefill-several", "chunk", "mixed")

_STEPS: dict[str, Sequence[tuple[int, int]]] = {
    "token": [(1, 1)],
    "decode": [(1, 37)],
    "decode-long": [(1, 700)],
    "decode-equal": [(1, 33)] * 5,
    "decode-block-edges": [(1, 15), (1, 16), (1, 17), (1, 32)],
    "decode-many": [(1, length) for length in range(1, 42)],
    "decode-uneven": [(1, 1), (1, 400), (1, 2), (1, 300), (1, 290)],
    "prefill": [(7, 7)],
    "prefill-block": [(16, 16)],
    "prefill-several": [(3, 3), (40, 40), (2, 2)],
    "chunk": [(20, 50)],
    "chunk-of-long": [(70, 600)],
    "chunk-last-token-first": [(2, 3), (5, 300)],
    "mixed": [(1, 40), (12, 12), (1, 3), (1, 290), (5, 33), (1, 1), (1, 100)],
}


def _paged_attentions(dtype: str) -> Iterator[KernelCase]:
    for step, geometry, scattered in product(_STEPS, _GEOMETRIES, (False, True)):
        query = _attention_query("paged_attention", dtype, *geometry)
        heads, kv_heads, size = geometry
        name = f"paged_attention-{dtype}-{heads}:{kv_heads}x{size}-{step}{'-scattered' if scattered else ''}"
        check = partial(_check_paged, geometry=geometry, lens=_STEPS[step], scattered=scattered)
        yield KernelCase(name, query, check)
        if step in _NAN_STEPS and not scattered:
            yield KernelCase(f"{name}{NAN_CASE}", query, partial(check, unwritten=math.nan))


def _check_paged(
    bench: Bench,
    *,
    geometry: Sequence[int],
    lens: Sequence[tuple[int, int]],
    scattered: bool,
    unwritten: float = _UNWRITTEN,
) -> None:
    """Write what was there before in one step and this step's in another; attend after the second."""
    heads, kv_heads, head_size = geometry
    size = bench.device.capabilities.kv_block_size
    tables, num_blocks = _block_tables(bench, [length for _, length in lens], size, scattered)
    write, attend = bench.kernels.paged(bench.query)
    kv = KVGeometry(num_layers=2, num_kv_heads=kv_heads, head_size=head_size)
    layers = allocate_kv(bench.device, num_blocks, size, kv, bench.dtype)
    for layer in layers:
        layer.k.fill_(unwritten)
        layer.v.fill_(unwritten)
    shape = (num_blocks, size, kv_heads, head_size)
    expected_layer = KVLayer(k=torch.full(shape, unwritten), v=torch.full(shape, unwritten))
    scale = head_size**-0.5

    before = [(length - query_len, length - query_len) for query_len, length in lens]
    for step in (before, lens):
        present = [(table, *pair) for table, pair in zip(tables, step) if pair[0] > 0]
        if not present:
            continue
        batch = _batch(present, size)
        q, k, v = (bench.draw(len(batch.slots), n, head_size) for n in (heads, kv_heads, kv_heads))
        put_q, put_k, put_v = bench.fused(q, k, v)
        plan = bench.kernels.plan_attention(replace(batch, device=bench.device.torch_device))
        expected_plan = reference.plan_attention(batch)
        write(put_k, put_v, layers[1], plan)
        reference.write_kv(k, v, expected_layer, expected_plan)
        expected = reference.paged_attention(q, expected_layer, expected_plan, scale)
        bench.compare(attend(put_q, layers[1], plan, scale), expected, "attention")

    for name in ("k", "v"):
        stored = getattr(layers[1], name).to("cpu").float()
        torch.testing.assert_close(
            stored, getattr(expected_layer, name), rtol=0, atol=0, equal_nan=True, msg=f"cache of {name}"
        )
        other = getattr(layers[0], name).to("cpu").float()
        untouched = torch.full(shape, unwritten).equal(other) or bool(
            other.isnan().all() and unwritten != unwritten
        )
        assert untouched, f"the {name} of another layer was written"


def _rotary_paged_attentions(dtype: str) -> Iterator[KernelCase]:
    for step, geometry, partial_width in product(_STEPS, _GEOMETRIES, (False, True)):
        query = _attention_query("rotary_paged_attention", dtype, *geometry)
        heads, kv_heads, size = geometry
        width = size // 2 if partial_width else size
        name = f"rotary_paged_attention-{dtype}-{heads}:{kv_heads}x{size}-of-{width}-{step}"
        check = partial(_check_rotary_paged, geometry=geometry, width=width, lens=_STEPS[step])
        yield KernelCase(name, query, check)
        if step in _NAN_STEPS:
            yield KernelCase(f"{name}{NAN_CASE}", query, partial(check, unwritten=math.nan))


def _check_rotary_paged(
    bench: Bench,
    *,
    geometry: Sequence[int],
    width: int,
    lens: Sequence[tuple[int, int]],
    unwritten: float = _UNWRITTEN,
) -> None:
    """As `_check_paged`, in one op; and what it stored serves the ops that it stands for."""
    heads, kv_heads, head_size = geometry
    size = bench.device.capabilities.kv_block_size
    tables, num_blocks = _block_tables(bench, [length for _, length in lens], size, True)
    fused = bench.kernels.rotary_paged(bench.query)
    _, attend = bench.kernels.paged(replace(bench.query, op="paged_attention"))
    kv = KVGeometry(num_layers=1, num_kv_heads=kv_heads, head_size=head_size)
    (layer,) = allocate_kv(bench.device, num_blocks, size, kv, bench.dtype)
    layer.k.fill_(unwritten)
    layer.v.fill_(unwritten)
    shape = (num_blocks, size, kv_heads, head_size)
    expected_layer = KVLayer(k=torch.full(shape, unwritten), v=torch.full(shape, unwritten))
    scale = head_size**-0.5

    before = [(length - query_len, length - query_len) for query_len, length in lens]
    for step in (before, lens):
        present = [(table, *pair) for table, pair in zip(tables, step) if pair[0] > 0]
        if not present:
            continue
        batch = _batch(present, size)
        tokens = len(batch.slots)
        q, k, v = (bench.draw(tokens, n, head_size) for n in (heads, kv_heads, kv_heads))
        angles = torch.rand(tokens, width // 2, generator=torch.Generator().manual_seed(tokens)) * 100
        cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
        expected_plan = reference.plan_attention(batch)
        turned_q, turned_k = reference.rotary(q, k, cos, sin)
        # The cache holds the run dtype, so that what is read back is what the device has.
        turned_k = turned_k.to(bench.dtype).float()
        reference.write_kv(turned_k, v, expected_layer, expected_plan)
        expected = reference.paged_attention(turned_q, expected_layer, expected_plan, scale)
        put_q, put_k, put_v = bench.fused(q, k, v)
        plan = bench.kernels.plan_attention(replace(batch, device=bench.device.torch_device))
        put_cos, put_sin = (table.to(bench.device.torch_device) for table in (cos, sin))
        got = fused(put_q, put_k, put_v, put_cos, put_sin, layer, plan, scale)
        bench.compare(got, expected, "attention")
        bench.compare(put_v, v, "v, which is next to q and k in memory")
        again = attend(bench.put(turned_q), layer, plan, scale)
        bench.compare(again, expected, "attention over what was stored")


def _block_tables(
    bench: Bench, lengths: Sequence[int], size: int, scattered: bool
) -> tuple[list[list[int]], int]:
    """Blocks for each sequence, one block more than needed for the last, and how many there are."""
    counts = [-(-length // size) for length in lengths]
    counts[-1] += 1
    total = sum(counts) + 2
    blocks = iter(bench.shuffled(total) if scattered else range(1, total))
    return [list(islice(blocks, count)) for count in counts], total


def _batch(sequences: Sequence[tuple[list[int], int, int]], size: int) -> AttentionBatch:
    """The batch of sequences given as (block table, query length, context length)."""
    tables, query_lens, context_lens = zip(*sequences)
    slots = [
        table[position // size] * size + position % size
        for table, query_len, length in sequences
        for position in range(length - query_len, length)
    ]
    return AttentionBatch(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=tables,
        slots=slots,
        block_size=size,
        device="cpu",
    )


# name -> query lengths, key lengths of the segments (None: the same)
_SEGMENTS: dict[str, tuple[Sequence[int], Sequence[int] | None]] = {
    "one": ([1], None),
    "single": ([49], None),
    "equal": ([64, 64, 64], None),
    "uneven": ([5, 64, 64, 1, 130], None),
    "windows": ([16] * 9 + [8, 4], None),
    "resampler": ([12, 12, 12], [100, 100, 37]),
    "cross-one": ([7], [300]),
}


def _dense_attentions(dtype: str) -> Iterator[KernelCase]:
    sizes = ((2, 16), (16, 40), (4, 64), (3, 72), (8, 80), (2, 96), (2, 128))
    for (name, (q_lens, k_lens)), (heads, size) in product(_SEGMENTS.items(), sizes):
        query = _attention_query("dense_attention", dtype, heads, heads, size)
        check = partial(_check_dense, heads=heads, size=size, q_lens=q_lens, k_lens=k_lens)
        yield KernelCase(f"dense_attention-{dtype}-{heads}x{size}-{name}", query, check)


def _check_dense(
    bench: Bench, *, heads: int, size: int, q_lens: Sequence[int], k_lens: Sequence[int] | None
) -> None:
    num_keys = sum(q_lens if k_lens is None else k_lens)
    q, k, v = (bench.draw(rows, heads, size) for rows in (sum(q_lens), num_keys, num_keys))
    expected = reference.dense_attention(q, k, v, q_lens, k_lens, size**-0.5)
    if k_lens is None:
        put_q, put_k, put_v = bench.fused(q, k, v)
    else:
        put_q, (put_k, put_v) = bench.put(q), bench.fused(k, v)
    got = bench.kernels.dense_attention(bench.query)(put_q, put_k, put_v, q_lens, k_lens, size**-0.5)
    bench.compare(got, expected, "attention")


# ---- Searching rows ------------------------------------------------------------------------------


def _top_ks(dtype: str) -> Iterator[KernelCase]:
    for rows, size, k in product((1, 5), (40, 1024, 5003, 33000), (1, 8, 128)):
        if k <= size:
            query = KernelQuery(op="top_k", dtype=dtype, size=size)
            check = partial(_check_top_k, rows=rows, size=size, k=k)
            yield KernelCase(f"top_k-{dtype}-{rows}x{size}-{k}", query, check)


def _check_top_k(bench: Bench, *, rows: int, size: int, k: int) -> None:
    """Numbers as they come, then with many equal ones, then a row with NaN, which counts as largest."""
    search = bench.kernels.top_k(bench.query)
    x = bench.draw(rows, size)
    levels = (x * 4).round() / 4  # many equal values
    for drawn in (x, levels):
        values, ids = search(bench.put(drawn), k)
        bench.compare(values, reference.top_k(drawn, k)[0], "values")
        assert ids.dtype == torch.int64, f"ids: got {ids.dtype}, expected int64"
        bench.compare(values, drawn.gather(1, ids.cpu()), "values at the ids")
        assert all(len(set(row)) == k for row in ids.tolist()), "ids: one occurs twice in a row"
    if k == 1:
        first = reference.top_k(levels, 1)[1].tolist()
        assert search(bench.put(levels), 1)[1].tolist() == first, "ids: the lowest of equal values"
    x[0, size // 2] = math.nan
    values, ids = search(bench.put(x), k)
    assert math.isnan(values[0, 0].item()), "NaN counts as largest"
    assert ids[0, 0].item() == size // 2, "the place of NaN"


# ---- Between ranks -------------------------------------------------------------------------------


def _exchanges(dtype: str) -> Iterator[KernelCase]:
    yield from (KernelCase(name, query, check) for name, query, check in exchange_cases(dtype))
