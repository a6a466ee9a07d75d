"""How functions of torch_mlu_ops are found and called, whatever they name their arguments."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from opsin_device_mlu.binding import Unbindable, signature_text, ways
from opsin_device_mlu.book import FUNCTIONS, OPTIONAL, Function
from opsin_device_mlu.ops import Ops, find_ops, version_numbers
from opsin_device_mlu.settings import Settings

MATMUL = FUNCTIONS["matmul"]


def function(arguments: str) -> Callable[..., Any]:
    """A function that takes these arguments and gives them back by name."""
    scope: dict[str, Any] = {}
    exec(f"def made({arguments}): return dict(locals())", scope)
    made: Callable[..., Any] = scope["made"]
    return made


def package(**changes: Callable[..., Any] | None) -> ModuleType:
    """A torch_mlu_ops with the known functions, but for the changes (None: not there)."""
    module = ModuleType("torch_mlu_ops")
    module.__version__ = "1.3.2"  # type: ignore[attr-defined]
    for name, known in FUNCTIONS.items():
        setattr(module, name, function(", ".join(known.arguments)))
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


def test_all_known_functions_are_found(find: Callable[..., Ops]) -> None:
    ops = find(package())
    assert set(ops.calls) == set(FUNCTIONS)
    assert (ops.version, ops.refused, ops.missing) == ("1.3.2", {}, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("a, b, bias=None, c=None, act_mode='none', alpha=1.0, beta=0.0", {"a": 1, "b": 2, "bias": 3}),
        ("input, filter, bias, residual, act_mode, alpha, beta, use_fast, approximate", {
            "input": 1, "filter": 2, "bias": 3, "residual": None, "act_mode": "none", "alpha": 1.0,
            "beta": 0.0, "use_fast": False, "approximate": False,
        }),
        ("bias, b, a, layout='x', *, filter_format=0", {"a": 1, "b": 2, "bias": 3}),
        ("A, B, Bias, /, act_mode='silu'", {"A": 1, "B": 2, "Bias": 3, "act_mode": "silu"}),
    ],
)  # fmt: skip
def test_arguments_are_passed_by_what_they_mean(arguments: str, expected: dict[str, Any]) -> None:
    """Another spelling, another order, more of them: each value arrives where it belongs."""
    [call] = ways(function(arguments), MATMUL)
    assert expected.items() <= call(a=1, b=2, bias=3).items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a, bias=None", r"takes \(a, bias\); expected one that means b"),
        ("a, b, layout", "what layout means is not known"),
        ("a, b, *, layout", "what layout means is not known"),
    ],
)
def test_what_is_not_known_is_refused(find: Callable[..., Ops], arguments: str, message: str) -> None:
    with pytest.raises(Unbindable, match=message):
        ways(function(arguments), MATMUL)
    ops = find(package(matmul=function(arguments)))
    assert set(FUNCTIONS) - set(ops.calls) == {"matmul"}
    assert "OPSIN_MLU_TRUST_SIGNATURES=1" in ops.refused["matmul"]
    assert "matmul" in find(package(matmul=function(arguments)), trust_signatures=True).calls


def decorated(inner: Callable[..., Any], *, by_keyword: bool = True) -> Callable[..., Any]:
    """As torch_mlu_ops' gen-case decorator: the name of nothing is kept."""

    def anyhow(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    def by_position(*args: Any) -> Any:
        return inner(*args)

    return anyhow if by_keyword else by_position


@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_decorator_hides_nothing(depth: int, by_keyword: bool) -> None:
    wrapped = function("filter, input, bias=None")
    for _ in range(depth):
        wrapped = decorated(wrapped, by_keyword=by_keyword)
    [call] = ways(wrapped, MATMUL)
    assert call(a=1, b=2) == {"input": 1, "filter": 2, "bias": None}


def test_functools_wraps_hides_nothing() -> None:
    inner = function("filter, input, bias=None")
    [call] = ways(functools.wraps(inner)(decorated(inner)), MATMUL)
    assert call(a=1, b=2)["input"] == 1


def test_what_tells_nothing_is_called_in_the_orders_that_are_known() -> None:
    class Compiled:
        def __call__(self, *args: Any) -> Any:
            return args

        @property
        def __signature__(self) -> Any:
            raise ValueError("no signature found")

    callers, manual = ways(Compiled(), FUNCTIONS["flash_attention"])
    given = {name: name for name in FUNCTIONS["flash_attention"].arguments}
    assert callers(**given) == FUNCTIONS["flash_attention"].arguments
    scales = {"k_cache_quant_scale": None, "v_cache_quant_scale": None}
    expected = tuple(scales.get(name, name) for name in FUNCTIONS["flash_attention"].printed)
    assert manual(**given) == expected
    [matmul, of_the_manual] = ways(Compiled(), MATMUL)
    assert matmul(a=1, b=2) == (1, 2), "what asks for nothing is left out"
    assert of_the_manual(a=1, b=2) == (1, 2, None, None, "none", 1.0, 0.0, False, False)
    assert "not told" in signature_text(Compiled())


def test_every_value_that_asks_for_nothing_has_a_place() -> None:
    for name, known in FUNCTIONS.items():
        assert isinstance(known, Function)
        assert set(known.spellings) <= {*known.arguments, *known.nothing}, name
        assert set(known.printed) <= {*known.arguments, *known.nothing}, name


def test_functions_that_are_missing(find: Callable[..., Ops]) -> None:
    ops = find(package(active=None, weight_only_quant_matmul=None))
    assert ops.refused == {"active": "torch_mlu_ops has no active"}
    assert {"weight_only_quant_matmul"} == OPTIONAL


def test_a_function_that_is_replaced_is_looked_at_anew(find: Callable[..., Ops]) -> None:
    """What was measured of one set of functions says nothing of another."""
    module = package()
    assert find(module) is find(module)
    before = find(module)
    module.matmul = function("a, b, bias=None")  # type: ignore[attr-defined]
    assert find(module) is not before


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


def test_versions() -> None:
    assert version_numbers("1.3.2+pt25") == (1, 3, 2)
    assert version_numbers("1.12.1") > version_numbers("1.5")
    assert version_numbers(None) > version_numbers("99.0")


def test_pip_knows_the_version_best(find: Callable[..., Ops], monkeypatch: pytest.MonkeyPatch) -> None:
    """The manual documents pip's list only (4.1.4)."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"torch-mlu-ops": "1.3.2+pt25"}[name])
    assert find(package()).version == "1.3.2+pt25"
