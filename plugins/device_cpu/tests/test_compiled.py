"""The compiled kernels on every instruction set this processor has, and what their results may depend on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin import kernels as reference
from opsin.api import AttentionBatch, KVGeometry, KVLayer
from opsin_device_cpu import native

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=native.loaded().reason)

SIZE = 16

SUITE = """
from opsin.testing.kernels import check_kernel, kernel_cases
from opsin_device_cpu.device import open_device
from opsin_device_cpu.plugin import opsin_register_kernels
from opsin_device_cpu import native
device, specs = open_device(0), opsin_register_kernels()
print(native.loaded().reason)
cases = [case for case in kernel_cases(later_ops=True) if not case.query.op.startswith("prepare")]
assert len(cases) > 900
for case in cases:
    assert check_kernel(case, device, specs).provider == "cpu", case
"""


def run_suite(**variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", SUITE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512vnni", "amx", "dotprod"])
def test_the_contract_on_each_instruction_set(isa: str) -> None:
    assert LIBRARY is not None
    if not LIBRARY.opsin_has_isa(isa.encode()):
        assert native.loaded().reason.split(",")[0] != isa
        return
    assert run_suite(OPSIN_CPU_ISA=isa).startswith(f"{isa},")


@pytest.mark.slow
def test_the_contract_on_torch_alone() -> None:
    assert run_suite(OPSIN_CPU_NATIVE="0").startswith("switched off")


def batch(lens: list[tuple[int, int]], tables: list[list[int]]) -> AttentionBatch:
    slots = [
        table[position // SIZE] * SIZE + position % SIZE
        for table, (query_len, length) in zip(tables, lens)
        for position in range(length - query_len, length)
    ]
    queries, contexts = zip(*lens)
    return AttentionBatch(
        query_lens=queries,
        context_lens=contexts,
        block_tables=tables,
        slots=slots,
        block_size=SIZE,
        device="cpu",
    )


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], int, int, int, torch.dtype, int]:
    contexts = draw(st.lists(st.integers(1, 40) | st.integers(1, 700), min_size=1, max_size=5))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 7, 8]))
    head_size = draw(st.sampled_from([2, 8, 16, 20, 40, 64, 72, 80, 96, 128]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return contexts, kv_heads, group, head_size, dtype, draw(st.integers(0, 2**20))


@given(steps())
@settings(max_examples=40, deadline=None)
def test_together_and_whole_is_one_by_one_and_in_chunks(
    drawn: tuple[list[int], int, int, int, torch.dtype, int],
) -> None:
    """Bit for bit; and near the reference."""
    from opsin_device_cpu.compiled import attention

    contexts, kv_heads, group, size, dtype, seed = drawn
    heads = kv_heads * group
    random = torch.Generator().manual_seed(seed)
    counts = [-(-length // SIZE) for length in contexts]
    blocks = torch.randperm(sum(counts), generator=random).tolist()
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    rows = [torch.randn(n, heads + 2 * kv_heads, size, generator=random).to(dtype) for n in contexts]
    geometry = KVGeometry(num_layers=2, num_kv_heads=kv_heads, head_size=size)
    together, apart = attention.allocate_kv(sum(counts), SIZE, geometry, dtype)
    for layer in (together, apart):
        layer.memory.fill_(float("nan"))  # what was never written is not let through

    angles = [torch.rand(n, size // 2, generator=random) * 50 for n in contexts]
    turns = [torch.cat((angle, angle), -1) for angle in angles]

    def attend(lens: list[tuple[int, int]], own: list[list[int]], x: torch.Tensor, turn: torch.Tensor, layer):  # type: ignore[no-untyped-def]
        q, k, v = x.clone().split([heads, kv_heads, kv_heads], 1)
        plan = attention.plan_attention(batch(lens, own))
        return attention.rotary_paged_attention(q, k, v, turn.cos(), turn.sin(), layer, plan, size**-0.5)

    lens = [(n, n) for n in contexts]
    whole = attend(lens, tables, torch.cat(rows), torch.cat(turns), together).split(contexts)
    for x, turn, table, expected in zip(rows, turns, tables, whole):
        at, parts = 0, []
        while at < len(x):
            count = min(len(x) - at, int(torch.randint(1, 200, (), generator=random)))
            count = count if seed % 3 else min(count, 2)
            part = slice(at, at + count)
            parts.append(attend([(count, at + count)], [table], x[part], turn[part], apart))
            at += count
        assert torch.equal(torch.cat(parts), expected)

    plan = reference.plan_attention(batch(lens, tables))
    shape = (sum(counts), SIZE, kv_heads, size)
    cache = KVLayer(k=torch.zeros(shape), v=torch.zeros(shape))
    q, k, v = torch.cat(rows).float().split([heads, kv_heads, kv_heads], 1)
    turn = torch.cat(turns)
    q, k = reference.rotary(q, k, turn.cos(), turn.sin())
    reference.write_kv(k.to(dtype).float(), v, cache, plan)
    wanted = reference.paged_attention(q, cache, plan, size**-0.5)
    tolerance = 3e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(torch.cat(whole).float(), wanted, rtol=0, atol=tolerance)


def test_a_long_context_is_the_same_on_any_number_of_threads() -> None:
    """Few heads over many keys are shared out among the workers by tiles."""
    from opsin_device_cpu.compiled import attention

    length, geometry = 9_000, KVGeometry(num_layers=1, num_kv_heads=1, head_size=64)
    (layer,) = attention.allocate_kv(-(-length // SIZE), SIZE, geometry, torch.float32)
    layer.memory.normal_(generator=torch.Generator().manual_seed(0))
    plan = attention.plan_attention(batch([(3, length)], [list(range(-(-length // SIZE)))]))
    q = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 8):
            native.set_threads(threads)
            results.append(attention.paged_attention(q, layer, plan, 0.125))
    finally:
        native.set_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_an_earlier_call_are_not_let_through(dtype: torch.dtype) -> None:
    """Partial results are kept in memory that is used again: one request's NaN is no other's."""
    from opsin_device_cpu.compiled import attention

    length, geometry = 9_000, KVGeometry(num_layers=1, num_kv_heads=1, head_size=64)
    (layer,) = attention.allocate_kv(-(-length // SIZE), SIZE, geometry, dtype)
    layer.memory.normal_(generator=torch.Generator().manual_seed(0))
    plan = attention.plan_attention(batch([(3, length)], [list(range(-(-length // SIZE)))]))
    q = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = torch.get_num_threads()
    try:
        native.set_threads(1)
        expected = attention.paged_attention(q, layer, plan, 0.125)
        native.set_threads(2)
        for poison in (float("nan"), float("inf")):
            attention.paged_attention(torch.full_like(q, poison), layer, plan, 0.125)
            assert torch.equal(attention.paged_attention(q, layer, plan, 0.125), expected)
    finally:
        native.set_threads(before)


def test_a_sequence_may_read_what_another_writes_in_the_same_step() -> None:
    from opsin_device_cpu.compiled import attention

    geometry = KVGeometry(num_layers=1, num_kv_heads=2, head_size=16)
    attention.allocate_kv(40, SIZE, geometry, torch.float32)
    table = list(range(40))
    shared = batch([(1, 640), (1, 639)], [table, table])
    plan = attention.plan_attention(shared)
    assert plan.numbers[3] == 1
    assert attention.plan_attention(batch([(1, 17), (1, 16)], [[0, 1], [2]])).numbers[3] == 0


@pytest.mark.parametrize(
    ("lens", "tables"),
    [([(2, 1)], [[0]]), ([(1, 17)], [[0]]), ([(1, 16)], [[-1]])],
    ids=["context shorter than its queries", "too few blocks", "no such block"],
)
def test_bad_plans_are_refused(lens: list[tuple[int, int]], tables: list[list[int]]) -> None:
    from opsin_device_cpu.compiled import attention

    queries, contexts = zip(*lens)
    bad = AttentionBatch(
        query_lens=queries,
        context_lens=contexts,
        block_tables=tables,
        slots=[0] * sum(queries),
        block_size=SIZE,
        device="cpu",
    )
    with pytest.raises(ValueError, match="do not fit"):
        attention.plan_attention(bad)


def test_what_lies_outside_of_the_cache_is_refused() -> None:
    from opsin_device_cpu.compiled import attention

    geometry = KVGeometry(num_layers=1, num_kv_heads=1, head_size=16)
    (layer,) = attention.allocate_kv(2, SIZE, geometry, torch.float32)
    plan = attention.plan_attention(batch([(1, 33)], [[0, 1, 2]]))
    with pytest.raises(ValueError, match="beyond the end"):
        attention.paged_attention(torch.zeros(1, 1, 16), layer, plan, 1.0)
    fitting = attention.plan_attention(batch([(1, 3)], [[0]]))
    for q in (torch.zeros(2, 1, 16), torch.zeros(1, 1, 8), torch.zeros(1, 1, 16, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="expected"):
            attention.paged_attention(q, layer, fitting, 1.0)
