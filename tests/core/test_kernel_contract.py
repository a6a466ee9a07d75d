"""The contract suite itself: the reference fulfils it, and every broken kernel is caught by some case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from opsin import kernels
from opsin.api import (
    Activation,
    Capabilities,
    Device,
    KernelSpec,
    KVLayer,
    LinearFn,
    MemoryInfo,
    OpName,
    Parallel,
)
from opsin.testing.kernels import WEIGHT_FORMS, KernelCase, check_kernel, kernel_cases

HOST = Device(
    name="host",
    torch_device="cpu",
    capabilities=Capabilities(dtypes=("float32", "float16"), dtype_for={}),
    memory=lambda: MemoryInfo(free_bytes=0, total_bytes=0),
)


ALL_CASES = kernel_cases(["float32", "float16"], later_ops=True, weights=WEIGHT_FORMS)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_the_reference_fulfils_the_contract(case: KernelCase) -> None:
    assert check_kernel(case, HOST, []).provider == "reference"


def test_names_are_unique() -> None:
    names = [str(case) for case in kernel_cases()]
    assert len(set(names)) == len(names)


def _overwritten_residual(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    normed, _ = kernels.rms_norm(x, weight, eps, residual)
    return normed, x


def _unbiased(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return kernels.layer_norm(x, weight, None, eps)


def _swapped(x: Tensor, activation: Activation) -> Tensor:
    return kernels.gated_act(torch.cat(x.chunk(2, -1)[::-1], -1), activation)


def _interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
        return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

    return rotate(q), rotate(k)


def _beyond_the_head(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    rotated = kernels.rotary(q, k, cos, sin)
    k.as_strided((1,), (1,), k.storage_offset() + k.shape[1] * k.shape[2]).zero_()
    return rotated


def _spilling_write(k: Tensor, v: Tensor, layer: KVLayer, plan: kernels.ReferencePlan) -> None:
    kernels.write_kv(k, v, layer, plan)
    layer.v[plan.slots // plan.batch.block_size] = layer.v[plan.slots // plan.batch.block_size].nan_to_num(
        0.0
    )


def _top_left(q: Tensor, layer: KVLayer, plan: kernels.ReferencePlan, scale: float) -> Tensor:
    outputs = []
    at = 0
    for index, (count, length) in enumerate(zip(plan.batch.query_lens, plan.batch.context_lens)):
        blocks = plan.block_ids[index]
        k, v = (x[blocks].flatten(0, 1)[:length].transpose(0, 1) for x in (layer.k, layer.v))
        rows = q[at : at + count].transpose(0, 1)
        k, v = (x.repeat_interleave(rows.shape[0] // x.shape[0], 0) for x in (k, v))
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                rows[None], k[None], v[None], is_causal=True, scale=scale
            )[0].transpose(0, 1)
        )
        at += count
    return torch.cat(outputs)


def _whole_blocks(q: Tensor, layer: KVLayer, plan: kernels.ReferencePlan, scale: float) -> Tensor:
    clean = KVLayer(k=layer.k, v=layer.v.clone())
    for blocks, length in zip(plan.block_ids, plan.batch.context_lens):
        last = clean.v[blocks[-1], (length - 1) % plan.batch.block_size]
        last += 0.0 * layer.v[blocks].sum(dim=(0, 1))
    return kernels.paged_attention(q, clean, plan, scale)


def _wrong_groups(q: Tensor, layer: KVLayer, plan: kernels.ReferencePlan, scale: float) -> Tensor:
    kv_heads = layer.k.shape[2]
    order = torch.arange(q.shape[1]).view(-1, kv_heads).t().flatten()
    return kernels.paged_attention(q[:, order], layer, plan, scale)[:, order.argsort()]


def _one_segment(
    q: Tensor, k: Tensor, v: Tensor, q_lens: Sequence[int], k_lens: Sequence[int] | None, scale: float
) -> Tensor:
    return kernels.dense_attention(q, k, v, [q.shape[0]], [k.shape[0]], scale)


def _query_lengths_for_keys(
    q: Tensor, k: Tensor, v: Tensor, q_lens: Sequence[int], k_lens: Sequence[int] | None, scale: float
) -> Tensor:
    total = sum(q_lens)
    return kernels.dense_attention(q, k[:total], v[:total], q_lens, None, scale)


def _bias_after_activation(
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    *,
    keep_weight: bool,
    few_rows: bool = False,
) -> LinearFn:
    plain = kernels.prepare_linear(weight, None, activation, keep_weight=keep_weight, few_rows=few_rows)
    return plain if bias is None else lambda x: plain(x) + bias


def _spoiled_weight(
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    *,
    keep_weight: bool,
    few_rows: bool = False,
) -> LinearFn:
    own = weight.clone()
    weight.zero_()
    return kernels.prepare_linear(own, bias, activation, keep_weight=keep_weight, few_rows=few_rows)


def _rounded_weight(
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    *,
    keep_weight: bool,
    few_rows: bool = False,
) -> LinearFn:
    return kernels.prepare_linear(
        weight.half().to(weight.dtype), bias, activation, keep_weight=keep_weight, few_rows=few_rows
    )


def _own_half_twice(x: Tensor, widths: Sequence[int], place: Parallel) -> Tensor:
    return kernels.all_gather(x, widths, place).roll(place.rank, 1)


def _in_any_order(x: Tensor, place: Parallel) -> Tensor:
    return kernels.all_reduce(x, place) * (1 + place.rank * 1e-6)


BROKEN: list[tuple[OpName, Callable[..., Any]]] = [
    ("rms_norm", _overwritten_residual),
    ("layer_norm", _unbiased),
    ("gated_act", _swapped),
    ("rotary", _interleaved),
    ("rotary", _beyond_the_head),
    ("write_kv", _spilling_write),
    ("paged_attention", _top_left),
    ("paged_attention", _whole_blocks),
    ("paged_attention", _wrong_groups),
    ("dense_attention", _one_segment),
    ("dense_attention", _query_lengths_for_keys),
    ("prepare_linear", _bias_after_activation),
    ("prepare_linear", _spoiled_weight),
    ("prepare_linear", _rounded_weight),
    ("all_reduce", _in_any_order),
    ("all_gather", _own_half_twice),
]


@pytest.mark.parametrize(("op", "kernel"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_kernel_is_caught(op: OpName, kernel: Callable[..., Any]) -> None:
    table = {**kernels.REFERENCES, op: kernel}
    specs = [KernelSpec(device="host", op=name, load=lambda k=k: k) for name, k in table.items()]
    asked = "paged_attention" if op == "write_kv" else op
    cases = [case for case in kernel_cases(["float32"], later_ops=True) if case.query.op == asked]
    with pytest.raises(AssertionError):
        _check_all(cases, specs)


def _check_all(cases: Sequence[KernelCase], specs: Sequence[KernelSpec]) -> None:
    for case in cases:
        check_kernel(case, HOST, specs)
