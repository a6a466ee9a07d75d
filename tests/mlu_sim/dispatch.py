"""One fallback for every aten op on the card: it runs on the CPU over the same bytes, under the card's rules.

The rules, and what of the card they stand for:

- tensors of other devices are refused (but for 0-dim ones and indices), as on any accelerator;
- bfloat16 arithmetic is refused below capability major 5;
- arithmetic on int64 wraps at 32 bits, on float64 rounds to float32 ("double/long tensor is real float/int
  tensor", CNNL op parameters); storage and copies keep all bits;
- no tensor has 2**31 elements; memory ends with `torch.OutOfMemoryError`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.mlu_sim.card import CARD
from tests.mlu_sim.switches import SWITCHES
from tests.mlu_sim.tensors import CPU, CPU_KEY, adopt, alias, on_mlu, place

_INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}

_MOVES = {  # ops that only move bits
    *_INDEXING,
    "aten::_copy_from",
    "aten::_to_copy",
    "aten::arange",
    "aten::cat",
    "aten::clone",
    "aten::copy_",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::fill_",
    "aten::full",
    "aten::gather",
    "aten::index_copy_",
    "aten::index_select",
    "aten::masked_fill_",
    "aten::new_empty",
    "aten::scatter_",
    "aten::stack",
    "aten::where",
    "aten::zero_",
    "aten::zeros",
}


_FRESH = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"}


@dataclass(frozen=True)
class _Facts:
    """What the schema says of an op.

    Attributes:
        name: ``aten::add``.
        is_view: it returns an alias that it does not write.
        tensor_arguments: for each argument, whether it is a tensor (a number there is a wrapped number).
        outs: names of ``out=`` arguments.
    """

    name: str
    is_view: bool
    tensor_arguments: tuple[bool, ...]
    outs: frozenset[str]


@cache
def _facts(op: Any) -> _Facts:
    schema = op._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _Facts(
        name=schema.name,
        is_view=any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns),
        tensor_arguments=tuple(isinstance(a.type, torch.TensorType) for a in schema.arguments),
        outs=frozenset(a.name for a in written if a.kwarg_only),
    )


def fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an op on the simulated card."""
    facts = _facts(op)
    CARD.trace[facts.name] += 1
    special = _SPECIAL.get(facts.name)
    if special is not None:
        return special(op, *args, **kwargs)
    call = _Call(facts)
    cpu_args = [call.lower(x) for x in args]
    call.lowering_outs = facts.outs
    cpu_kwargs = {name: call.lower(x, name) for name, x in kwargs.items()}
    call.check()
    if facts.is_view and call.pairs:  # metadata only: the CPU's kernel on the mlu tensor itself
        return op.redispatch(CPU_KEY, *args, **kwargs)
    if cpu_kwargs.get("pin_memory"):
        raise RuntimeError("the simulated card has no pinned memory")
    # Wrapped numbers arrive as Python numbers; only the packet finds the overload that takes them.
    wrapped = any(
        is_tensor and isinstance(x, (int, float)) for is_tensor, x in zip(facts.tensor_arguments, args)
    )
    with torch._C._AutoDispatchBelowAutograd():  # type: ignore[attr-defined]
        result = (op.overloadpacket if wrapped else op)(*cpu_args, **cpu_kwargs)
        call.follow()
        if facts.name in ("aten::cos", "aten::sin") and SWITCHES.angles == "rough":
            rough = torch.cos if facts.name == "aten::cos" else torch.sin
            result.copy_(rough(cpu_args[0].half().float()))  # it may be an out= argument
        if facts.name in _FRESH and SWITCHES.memory == "NaN":
            _poison(result)
        return call.lift(result)


def _poison(fresh: Tensor) -> None:
    """Memory that nobody has written holds anything."""
    if fresh.is_floating_point():
        fresh.fill_(float("nan"))
    elif fresh.dtype in (torch.int32, torch.int64):
        fresh.fill_(2**30)


class _Call:
    """One op on its way to the CPU and back."""

    def __init__(self, facts: _Facts) -> None:
        self.facts = facts
        self.index = 0
        self.pairs: list[tuple[Tensor, Tensor, tuple[Any, ...]]] = []
        """mlu tensor, its CPU alias, the alias' layout before."""
        self.strangers: list[Tensor] = []
        self.lowering_outs: frozenset[str] = frozenset()
        self.dtypes: set[torch.dtype] = set()
        """Of the inputs."""

    def lower(self, x: Any, name: str = "") -> Any:
        """mlu tensors and devices inside x -> the CPU's."""
        if isinstance(x, Tensor):
            if x.device.type != "mlu":
                if x.device.type == "cpu" and x.dim() > 0:
                    self.strangers.append(x)
                return x
            for known, view, _ in self.pairs:
                if known is x:
                    return view
            is_out = name in self.lowering_outs
            resizable = is_out and x.numel() == 0
            view = torch.empty(x.shape, dtype=x.dtype) if resizable else alias(x)
            self.pairs.append((x, view, _layout(view)))
            self.index = x.device.index
            if not is_out:
                self.dtypes.add(x.dtype)
            return view
        if isinstance(x, torch.device):
            if x.type == "mlu":
                self.index = x.index or 0
                return CPU
            return x
        if isinstance(x, (list, tuple)):
            return [self.lower(part, name) for part in x]
        return x

    def check(self) -> None:
        """The card's refusals."""
        name = self.facts.name
        if self.strangers and self.pairs and name not in _INDEXING:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found at least two devices, "
                f"mlu:{self.index} and cpu"
            )
        if len({x.device.index for x, _, _ in self.pairs}) > 1:
            raise RuntimeError(f"{name}: tensors of several mlu devices")
        if CARD.major < 5 and name not in _MOVES and any(x.dtype == torch.bfloat16 for x, _, _ in self.pairs):
            raise RuntimeError(f"{name}: bfloat16 is not supported on {CARD.name}")

    def follow(self) -> None:
        """Repeat on the mlu tensors what happened to the layout of their aliases (out=, unsqueeze_)."""
        for x, view, before in self.pairs:
            after = _layout(view)
            if after == before:
                continue
            if after[0] == before[0]:
                place(x, x.untyped_storage(), *after[1:])
            else:
                fresh = adopt(view, self.index)
                place(x, fresh.untyped_storage(), *after[1:])

    def lift(self, result: Any) -> Any:
        """CPU tensors of a result -> the card's."""
        if isinstance(result, Tensor):
            known = next((x for x, view, _ in self.pairs if view is result), None)
            self._narrow(result)
            return adopt(result, self.index) if known is None else known
        if isinstance(result, (list, tuple)):
            return type(result)(self.lift(part) for part in result)
        return result

    def _narrow(self, result: Tensor) -> None:
        """64-bit arithmetic is 32-bit arithmetic."""
        if result.dtype not in (torch.int64, torch.float64) or self.facts.name in _MOVES:
            return
        if result.dtype in self.dtypes:
            CARD.wide[self.facts.name] += 1
            result.copy_(result.to(torch.int32 if result.dtype == torch.int64 else torch.float32))


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage().data_ptr(), x.storage_offset(), x.size(), x.stride()


def _copy_from(op: Any, source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if on_mlu(target) != on_mlu(source):
        CARD.trace["upload" if on_mlu(target) else "download"] += 1
    with torch.no_grad():
        to, of = (alias(x) if on_mlu(x) else x for x in (target, source))
        to.copy_(of)
    return target


def _resize(op: Any, x: Tensor, size: list[int], memory_format: Any = None) -> Tensor:
    view = alias(x)
    need = torch.empty(size, dtype=x.dtype)
    count = min(view.numel(), need.numel())
    need.view(-1)[:count] = view.flatten()[:count]
    place(x, adopt(need, x.device.index).untyped_storage(), 0, need.size(), need.stride())
    return x


def _set(op: Any, *args: Any, **kwargs: Any) -> Any:
    return op.redispatch(CPU_KEY, *args, **kwargs)


_SPECIAL: dict[str, Callable[..., Any]] = {
    "aten::_copy_from": _copy_from,
    "aten::_copy_from_and_resize": _copy_from,
    "aten::resize_": _resize,
    "aten::set_": _set,
    "aten::record_stream": lambda op, *args: None,
    "aten::is_pinned": lambda op, *args: False,
}


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> Any:  # its default kernel raises before a fallback is asked
    """``aten::convolution_overrideable``."""
    return fallback(torch.ops.aten.convolution.default, x, weight, bias, *settings)
