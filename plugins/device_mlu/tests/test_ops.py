"""Which functions of torch_mlu_ops are called, and which are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from opsin_device_mlu.ops import ARGUMENTS, OPTIONAL, Ops, find_ops, no_window, version_numbers
from opsin_device_mlu.settings import Settings


def function(arguments: str) -> Callable[..., Any]:
    """A function that takes these arguments."""
    scope: dict[str, Any] = {}
    exec(f"def made({arguments}): pass", scope)
    made: Callable[..., Any] = scope["made"]
    return made


def package(**changes: Callable[..., Any] | None) -> ModuleType:
    """A torch_mlu_ops with the known functions, but for the changes (None: not there)."""
    module = ModuleType("torch_mlu_ops")
    module.__version__ = "1.3.2"  # type: ignore[attr-defined]
    for name, arguments in ARGUMENTS.items():
        setattr(module, name, function(", ".join(arguments)))
    for name, changed in changes.items():
        if changed is None:
            delattr(module, name)
        else:
            setattr(module, name, changed)
    return module


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ops]:
    def find(module: ModuleType | None, **settings: Any) -> Ops:
        monkeypatch.setitem(sys.modules, "torch_mlu_ops", module)
        return find_ops(Settings(**settings))

    return find


def test_all_known_functions_are_called(find: Callable[..., Ops]) -> None:
    ops = find(package())
    assert set(ops.functions) == set(ARGUMENTS)
    assert (ops.version, ops.refused, ops.missing) == ("1.3.2", {}, "")


def test_added_optional_arguments_and_respelt_names_are_fine(find: Callable[..., Ops]) -> None:
    rotary = ", ".join(ARGUMENTS["apply_rotary"])
    decode = ", ".join(ARGUMENTS["single_query_cached_kv_attn"]).replace("max_context_len", "max_contxt_len")
    ops = find(
        package(
            apply_rotary=function(f"{rotary}, output=None, *, is_inverse=False, **others"),
            single_query_cached_kv_attn=function(decode),
        )
    )
    assert ops.refused == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "a, bias, b, c=None, act_mode='none', alpha=1.0, beta=0.0",
            r"takes \(a, bias, b, .*expected \(a, b, b",
        ),
        ("a, b, bias=None", r"takes \(a, b, bias\)"),
        ("a, b, bias, c, act_mode, alpha, beta, layout", "needs more arguments than are known: layout"),
        ("a, b, bias, c, act_mode, alpha, beta, *, layout", "needs more arguments than are known: layout"),
        ("*arguments", r"takes \(\)"),
    ],
)
def test_another_order_is_refused(find: Callable[..., Ops], arguments: str, message: str) -> None:
    ops = find(package(matmul=function(arguments)))
    assert set(ARGUMENTS) - set(ops.functions) == {"matmul"}
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(ops.refused["matmul"])
    assert "OPSIN_MLU_TRUST_SIGNATURES=1" in ops.refused["matmul"]


def test_trust_calls_what_cannot_be_read(find: Callable[..., Ops]) -> None:
    module = package(matmul=iter)  # a builtin that does not tell its arguments
    assert "does not tell its arguments" in find(module).refused["matmul"]
    assert find(module, trust_signatures=True).functions["matmul"] is iter


def test_functions_that_are_missing(find: Callable[..., Ops]) -> None:
    ops = find(package(active=None, weight_only_quant_matmul=None))
    assert ops.refused == {"active": "torch_mlu_ops has no active"}
    assert not ops.has("active")
    assert {"weight_only_quant_matmul"} == OPTIONAL


def test_a_package_that_is_not_used_says_why(
    find: Callable[..., Ops], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(package(), ops=False).missing == "torch_mlu_ops is switched off by OPSIN_MLU_OPS=0"
    monkeypatch.delitem(sys.modules, "torch_mlu_ops")
    assert find_ops(Settings()).missing == "torch_mlu_ops is not installed"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("raise OSError('libcnnl.so: no such file')", "OSError: libcnnl.so"),
        ("import a_library_that_is_not_there", "No module named 'a_library_that_is_not_there'"),
    ],
)
def test_a_package_that_cannot_be_imported(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    (tmp_path / "torch_mlu_ops.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    assert message in find_ops(Settings()).missing


def test_the_window_argument_follows_the_version() -> None:
    assert [no_window(Ops(version=v), Settings()) for v in ("1.3.2", "1.4.9+x", "1.5.0", "1.12.1", None)] == [
        *(0, 0),
        *(-1, -1, -1),
    ]
    assert no_window(Ops(version="1.3.2"), Settings(decode_window=-1)) == -1
    assert version_numbers("1.3.2+torch2.5") == (1, 3, 2)
