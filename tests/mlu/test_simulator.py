"""The simulated card is as strict as it says."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mlu_sim import CARD, SWITCHES, use_ops


@pytest.fixture(autouse=True)
def tmo() -> Any:
    import torch_mlu  # noqa: F401
    import torch_mlu_ops

    return torch_mlu_ops


def on_card(x: Tensor) -> Tensor:
    return x.to("mlu")


def half(*shape: int) -> Tensor:
    return on_card(torch.randn(shape, dtype=torch.float16))


def int32(*values: Any) -> Tensor:
    return on_card(torch.tensor(values, dtype=torch.int32))


def test_views_alias_and_have_true_strides() -> None:
    x = torch.arange(24.0, device="mlu").view(2, 3, 4)
    turned = x.transpose(1, 2)
    assert turned.stride() == (12, 1, 4)
    turned[0, 0, 0] = 99.0
    assert x[0, 0, 0].item() == 99.0
    q, k = torch.zeros(5, 12, device="mlu").split([8, 4], dim=-1)
    k += 1
    assert q.stride() == (12, 1)
    assert k.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
    assert q.sum().item() == 0


def test_results_are_the_cpu_s() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    given = torch.nn.functional.linear(on_card(x), on_card(weight)).softmax(-1)
    assert given.device == torch.device("mlu", 0)
    torch.testing.assert_close(given.cpu(), (x @ weight.t()).softmax(-1))
    out = torch.empty(0, device="mlu")
    torch.mm(on_card(x), on_card(weight).t(), out=out)
    torch.testing.assert_close(out.cpu(), x @ weight.t())


def test_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="at least two devices"):
        on_card(torch.ones(3)) + torch.ones(3)
    with CARD.changed(num_devices=2), pytest.raises(RuntimeError, match="at least two devices"):
        torch.ones(3, device="mlu:1") + torch.ones(3, device="mlu:0")
    with pytest.raises(TypeError):
        torch.ones(3, device="mlu").numpy()


def test_bfloat16_moves_but_does_not_compute() -> None:
    x = on_card(torch.ones(2, 2, dtype=torch.bfloat16))
    assert x.to(torch.float16).dtype == torch.float16
    with pytest.raises(RuntimeError, match="bfloat16 is not supported on MLU370-S4"):
        x @ x


def test_64_bit_arithmetic_is_32_bit() -> None:
    big = on_card(torch.tensor([2**30 + 1]))
    assert (big * 4).tolist() == [4]
    assert on_card(torch.tensor([2**40 + 1])).tolist() == [2**40 + 1], "storage keeps all bits"
    third = on_card(torch.ones(1, dtype=torch.float64)) / 3
    assert third.item() == torch.tensor(1 / 3).item()
    assert set(CARD.wide) == {"aten::mul", "aten::div"}


def test_memory_is_counted_and_ends() -> None:
    gc.collect()
    before = CARD.allocated[0]
    x = torch.empty(2**20, device="mlu")
    view = x[5:]
    assert CARD.allocated[0] - before == 2**22
    del x
    assert CARD.allocated[0] - before == 2**22, "a view keeps the storage"
    del view
    assert CARD.allocated[0] == before
    with CARD.changed(total_memory=before + 100), pytest.raises(torch.OutOfMemoryError, match="100 are free"):
        torch.empty(2**20, device="mlu")


def test_pinned_memory_is_not_there() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(4, device="cpu", pin_memory=True)


def refused(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_norm_refuses(tmo: Any) -> None:
    x, weight = half(4, 32), half(32)
    tmo.fused_rms_norm(x, None, weight, None, None, 1e-6, False)
    refused(lambda: tmo.fused_rms_norm(half(32, 4).t(), None, weight, None, None, 1e-6, False), "contiguous")
    refused(lambda: tmo.fused_rms_norm(x, None, weight.float(), None, None, 1e-6, False), "one dtype")
    refused(lambda: tmo.fused_rms_norm(x, None, weight.cpu(), None, None, 1e-6, False), "must be on mlu")
    refused(lambda: tmo.fused_rms_norm(half(0, 32), None, weight, None, None, 1e-6, False), "is empty")


def test_rotary_refuses_and_takes_sin_first(tmo: Any) -> None:
    x = half(1, 3, 2, 32)
    kept = x.cpu()
    zeros, ones = half(3, 32) * 0, half(3, 32) * 0 + 1
    tmo.apply_rotary(x, zeros, ones, None, None, False, False, False, 3)
    assert torch.equal(x.cpu(), kept), "sin 0 and cos 1 turn nothing"
    tmo.apply_rotary(x, ones, zeros, None, None, False, False, False, 3)
    assert not torch.equal(x.cpu(), kept), "and it works in place"
    refused(
        lambda: tmo.apply_rotary(x, zeros.float(), ones.float(), None, None, False, False, False, 3), "dtype"
    )
    long = on_card(torch.zeros(3, dtype=torch.int64))
    refused(lambda: tmo.apply_rotary(x, zeros, ones, long, None, False, True, False, 3), "int32")


def test_cache_writing_refuses_and_skips(tmo: Any) -> None:
    k, v, cache = half(2, 1, 32), half(2, 1, 32), half(2, 1, 16, 32) * 0
    other = cache.clone()
    tmo.reshape_paged_cache(k, v, cache, other, int32(17, -1))
    assert torch.equal(cache.cpu()[1, :, 1], k.cpu()[0])
    assert cache.cpu().count_nonzero() == k.cpu()[0].count_nonzero(), "a negative slot is skipped"
    refused(lambda: tmo.reshape_paged_cache(k, v, cache, other, int32(17, 32)), "slot 32 of 32")
    slots = on_card(torch.tensor([0, 1]))
    refused(lambda: tmo.reshape_paged_cache(k, v, cache, other, slots), "int32")
    narrow = half(2, 1, 16, 16) * 0
    tmo.reshape_paged_cache(half(1, 1, 16), half(1, 1, 16), narrow, narrow.clone(), int32(0))
    assert narrow.cpu()[..., 8:].count_nonzero() == 0, "half of a tiny head is lost"


def flash(tmo: Any, q: Tensor, k: Tensor, out: Tensor | None = None, **changes: Any) -> Any:
    count = q.shape[0]
    given = {"lens": int32(0, count), "longest": count, "tables": None, "dtype": torch.float32, **changes}
    return tmo.flash_attention(
        q, k, k, out, given["lens"], int32(0, given.get("context", count)), None, None, given["longest"],
        given.get("context", count), 1.0, True, -1, -1, given["dtype"], False, given["tables"],
    )  # fmt: skip


def test_flash_attention_refuses(tmo: Any) -> None:
    q, k = half(3, 2, 64), half(3, 1, 64)
    assert flash(tmo, q, k).shape == q.shape
    refused(lambda: flash(tmo, q, k, q), "share memory with q")
    refused(lambda: flash(tmo, half(3, 2, 72), half(3, 1, 72)), "head size 72")
    refused(lambda: flash(tmo, q, k, longest=2), "below the longest")
    refused(lambda: flash(tmo, q, k, lens=on_card(torch.tensor([0, 3]))), "int32")
    refused(lambda: flash(tmo, q.transpose(0, 1).contiguous().transpose(0, 1), k), "contiguous")
    apart = half(3, 3, 64)[:, :2]
    assert flash(tmo, apart, k).shape == q.shape
    with SWITCHES.changed(views="refused"):
        refused(lambda: flash(tmo, apart, k), "q must be contiguous")
    refused(lambda: flash(tmo, q, half(2, 1, 32, 64), tables=int32([0, 1])), "block size of 16")
    refused(lambda: flash(tmo, q, half(2, 1, 16, 64), tables=int32([0])), "one column")
    refused(lambda: flash(tmo, q, k, dtype=torch.bfloat16), "compute_dtype")


def decode(tmo: Any, q: Tensor, cache: Tensor, out: Tensor, longest: int = 5, window: int = -1) -> Any:
    return tmo.single_query_cached_kv_attn(
        q, cache, cache, out, int32([0, 0]), int32(5), None, None, None, longest, window, window, 1.0
    )


def test_decoding_refuses(ops: str) -> None:
    import torch_mlu_ops

    tmo = torch_mlu_ops
    q, cache = half(1, 1, 2, 64), half(1, 1, 16, 64)
    out = torch.empty_like(q)
    given = decode(tmo, q, cache, out)
    assert given is None if ops == "1.3.2" else given is out
    refused(lambda: decode(tmo, q, cache, q), "not q")
    refused(lambda: decode(tmo, q, cache, out, longest=4), "max_context_len 4 < 5")
    decode(tmo, q, cache, out, longest=0)
    many = half(1, 1, 129, 64)
    refused(lambda: decode(tmo, many, cache, torch.empty_like(many)), "at most 128")
    if ops == "1.3.2":
        refused(lambda: decode(tmo, q, cache, out, window=0), "windows_size_right < 0")
        with SWITCHES.changed(window="0"):
            decode(tmo, q, cache, out, window=0)
            refused(lambda: decode(tmo, q, cache, out, window=-1), "0, 0 means none")
    else:
        whole = out.clone()
        decode(tmo, q, cache, out, window=0)
        assert not torch.equal(out.cpu(), whole.cpu()), "0 is a window of one token"


def test_fresh_memory_holds_anything() -> None:
    assert torch.empty(3, device="mlu").isnan().all()
    assert torch.empty(3, dtype=torch.int32, device="mlu").tolist() != [0, 0, 0]
    assert torch.zeros(3, device="mlu").tolist() == [0, 0, 0]
    with SWITCHES.changed(memory="zeros"):
        assert not torch.empty(3, device="mlu").isnan().any()


def test_norms_and_caches_take_no_float32(tmo: Any) -> None:
    x, weight = half(4, 32).float(), half(32).float()
    refused(lambda: tmo.fused_rms_norm(x, None, weight, None, None, 1e-6, False), "float32 is not supported")
    with SWITCHES.changed(float32="right"):
        tmo.fused_rms_norm(x, None, weight, None, None, 1e-6, False)


def test_a_switch_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no switch 'windows': there are window, rotary"):
        SWITCHES.set(windows="0")


def test_names_of_arguments() -> None:
    import inspect

    for names, told in (("printed", "(input, filter, bias, residual"), ("hidden", "(*args")):
        with SWITCHES.changed(names=names):
            use_ops("1.3.2")
            import torch_mlu_ops

            assert str(inspect.signature(torch_mlu_ops.matmul)).startswith(told)
    with SWITCHES.changed(names="untold"):
        use_ops("1.3.2")
        import torch_mlu_ops as untold

        with pytest.raises(ValueError, match="no signature"):
            inspect.signature(untold.matmul)


def test_products_refuse(tmo: Any) -> None:
    a, b = half(2, 8), half(3, 8)
    assert tmo.matmul(a, b, half(3), None, "silu", 1.0, 0.0).shape == (2, 3)
    refused(lambda: tmo.matmul(a[None], b), "a \\(M, K\\)")
    refused(lambda: tmo.matmul(a, b.float()), "float32")
    refused(lambda: tmo.matmul(a, b, None, None, "quick_gelu"), "act_mode 'quick_gelu'")
    refused(lambda: tmo.active(half(2, 8), "gelu_tanh", True), "act_mode")
