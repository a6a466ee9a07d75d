"""Which kernels are right on this card: each is tried once, in the ways public text knows, before it is used.

What is right is kept; what raises or is wrong is declined, with the reason. Results are kept for the process,
by card, functions and switches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from opsin.api import Activation, QuantizedWeight, WeightForm
from opsin_device_mlu import linear, norms, trials
from opsin_device_mlu.attention import DenseAttention, KVWriter, PagedAttention
from opsin_device_mlu.binding import Call
from opsin_device_mlu.book import FUNCTIONS
from opsin_device_mlu.linear import Product
from opsin_device_mlu.ops import PACKAGE, Ops
from opsin_device_mlu.settings import Settings
from opsin_device_mlu.trials import Bench, Wrong

K = TypeVar("K")

logger = logging.getLogger(__name__)

_DECODING = [(1, 20), (1, 5), (1, 33)]
_CHUNKS = [(3, 20), (16, 32), (2, 5)]
_FRESH = [(5, 5), (17, 17)]

_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "quick_gelu")
_OF_ACTIVE = frozenset({"silu", "gelu", "quick_gelu"})
_OF_PRODUCTS = frozenset({"silu", "gelu"})
"""Modes that the manual lists."""
_WINDOWS = (-1, 0)
"""What may mean "no window" to the decoding kernel, the manual's first."""


class Declined(Exception):
    """No way to call a kernel is right. The text says what was tried and what came of it."""


@dataclass(frozen=True)
class Paged:
    """The kernels around the KV cache, for one dtype and head size.

    Attributes:
        write: `opsin.api.WriteKV`.
        attend: `opsin.api.PagedAttention`.
    """

    write: KVWriter
    attend: PagedAttention


class Measured:
    """The kernels of one card, each tried when it is first asked for.

    Args:
        ops: the package.
        settings: the switches.
        device: the card, e.g. ``"mlu:0"``.
    """

    def __init__(self, ops: Ops, settings: Settings, device: str) -> None:
        self._ops, self._settings, self._device = ops, settings, device
        self._kept: dict[tuple[object, ...], Any] = {}
        self.notes: dict[str, str] = {}
        """Kernel and dtype -> how it is called, for ``opsin doctor``."""
        self.declined: dict[str, str] = {}
        """Kernel and dtype -> why it is not used."""

    # ---- What kernels.py asks for ------------------------------------------------------------------

    def rms_norm(self, dtype: torch.dtype) -> norms.RmsNorm:
        """Raises `Declined`, as all of these."""

        def made() -> Iterator[tuple[str, norms.RmsNorm]]:
            for way in self._ways("fused_rms_norm", dtype):
                yield way.how, norms.RmsNorm(way)

        return self._first("rms_norm", dtype, made(), trials.rms_norm)

    def layer_norm(self, dtype: torch.dtype) -> norms.LayerNorm:
        """The kernel of layer_norm."""

        def made() -> Iterator[tuple[str, norms.LayerNorm]]:
            for way in self._ways("fused_layer_norm", dtype):
                yield way.how, norms.LayerNorm(way)

        return self._first("layer_norm", dtype, made(), trials.layer_norm)

    def gated_act(self, dtype: torch.dtype, activation: Activation) -> norms.GatedAct:
        """The kernel of gated_act. Either GELU may be what the package calls gelu."""
        listed = _OF_ACTIVE if self._settings.measure else _OF_ACTIVE & {activation}

        def made() -> Iterator[tuple[str, norms.GatedAct]]:
            for way in self._ways("active", dtype):
                for mode in _spellings(activation, listed):
                    yield f"{way.how}, as {mode}", norms.GatedAct(way, {activation: mode})

        return self._first(f"gated_act {activation}", dtype, made(), trials.gated_act(activation))

    def act(self, dtype: torch.dtype, activation: Activation) -> Callable[[Tensor], Tensor]:
        """An activation of its own."""
        listed = _OF_ACTIVE if self._settings.measure else _OF_ACTIVE & {activation}

        def made() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
            for way in self._ways("active", dtype):
                for mode in _spellings(activation, listed):
                    yield f"{way.how}, as {mode}", partial(_act, way, mode)

        # Torch has them all as well: what is not right here is noted, and no loss.
        trial = trials.elementwise(activation)
        return self._first(f"active {activation}", dtype, made(), trial, decisive=False)

    def rotary(self, dtype: torch.dtype) -> norms.Rotary:
        """The kernel of rotary."""
        options = (True, False) if self._settings.rotary_in_place else (False,)

        def made() -> Iterator[tuple[str, norms.Rotary]]:
            for way in self._ways("apply_rotary", dtype):
                for in_place in options:
                    where = "where q and k stand" if in_place else "on a copy of q and k"
                    yield f"{way.how}, {where}", norms.Rotary(way, in_place=in_place)

        def trial(bench: Bench, kernel: norms.Rotary) -> None:
            trials.rotary(bench, kernel.fresh())

        found = self._first("rotary", dtype, made(), trial).fresh()
        if ("partial", dtype) not in self._kept and self._settings.measure:
            self._kept["partial", dtype] = True
            try:
                with torch.inference_mode():
                    trials.partial_rotary(Bench(self._device, dtype), found.fresh())
            except Exception as error:
                self._kept["partial", dtype] = False
                self.notes[_label("rotary", dtype)] += f"; of parts of heads alone: {_short(error)}"
        found.partial = self._kept.get(("partial", dtype), True)
        return found

    def paged(self, dtype: torch.dtype, size: int) -> Paged:
        """The kernels around the KV cache: all of them, or none."""
        key = ("paged", dtype, size)
        if key not in self._kept:
            try:
                self._kept[key] = Paged(self._writer(dtype, size), self._attention(dtype, size))
            except Declined as error:
                self._kept[key] = error
                self._note(_label(f"paged_attention {size}", dtype), str(error))
        found: Paged = self._given(self._kept[key])
        return found

    def dense_attention(self, dtype: torch.dtype, size: int) -> DenseAttention:
        """The kernel of dense_attention."""

        def made() -> Iterator[tuple[str, DenseAttention]]:
            for way in self._ways("flash_attention", dtype):
                for views in (True, False):
                    yield (
                        f"{way.how}, {_views(views)}",
                        DenseAttention(
                            way, head_sizes=[size], views=views, compute_dtype=self._compute_dtype
                        ),
                    )

        def trial(bench: Bench, kernel: DenseAttention) -> None:
            trials.dense_attention(size)(bench, kernel.fresh())

        return self._first(f"dense_attention {size}", dtype, made(), trial).fresh()

    def product(self, dtype: torch.dtype) -> Product:
        """How to multiply by floats."""

        def made() -> Iterator[tuple[str, Product]]:
            for way in self._ways("matmul", dtype):
                yield from _product_ways(way)

        def trial(bench: Bench, product: Product) -> None:
            trials.linear(None)(bench, _floats(product))

        plain = self._first("linear", dtype, made(), trial)

        def checked(product: Product, activation: Activation) -> None:
            trials.linear(activation)(Bench(self._device, dtype), _floats(product))

        return self._with_activations("linear", dtype, plain, checked)

    def quantized_product(self, dtype: torch.dtype, form: WeightForm) -> tuple[Product, bool]:
        """How to multiply by weights of fewer bits, and whether even codes stand in low halves of bytes."""
        weight = trials.drawn_weight(form)
        halves = (True,) if form.kind == "int8" else (True, False)

        def made() -> Iterator[tuple[str, tuple[Product, bool]]]:
            for way in self._ways("weight_only_quant_matmul", dtype):
                for how, product in _product_ways(way):
                    for low_first in halves:
                        half = "" if form.kind == "int8" else f", {'low' if low_first else 'high'} half first"
                        yield f"{how}{half}", (product, low_first)

        def trial(bench: Bench, found: tuple[Product, bool]) -> None:
            product, low_first = found
            prepare = _quantized(bench, product, weight, low_first=low_first)
            trials.quantized_linear(weight, None)(bench, prepare)

        name = f"linear {form}"
        plain, low_first = self._first(name, dtype, made(), trial)

        def checked(product: Product, activation: Activation) -> None:
            bench = Bench(self._device, dtype)
            prepare = _quantized(bench, product, weight, low_first=low_first)
            trials.quantized_linear(weight, activation)(bench, prepare)

        return self._with_activations(name, dtype, plain, checked), low_first

    def all(self, dtypes: Iterable[torch.dtype], head_sizes: Iterable[int]) -> None:
        """Try what models usually need, so that what is declined is known before one is loaded."""
        for dtype in dtypes:
            wanted: list[Callable[[], object]] = [
                partial(self.rms_norm, dtype),
                partial(self.layer_norm, dtype),
                partial(self.rotary, dtype),
                partial(self.product, dtype),
                *(partial(self.gated_act, dtype, name) for name in ("silu", "gelu")),
                *(
                    partial(kernel, dtype, s)
                    for s in head_sizes
                    for kernel in (self.paged, self.dense_attention)
                ),
            ]
            for measure in wanted:
                try:
                    measure()
                except Declined:
                    continue

    # ---- How it is found out -----------------------------------------------------------------------

    def _writer(self, dtype: torch.dtype, size: int) -> KVWriter:
        def made() -> Iterator[tuple[str, KVWriter]]:
            for way in self._ways("reshape_paged_cache", dtype):
                for views in (True, False):
                    yield f"{way.how}, {_views(views)}", KVWriter(way, views=views)

        return self._first(f"write_kv {size}", dtype, made(), trials.write_kv(size))

    def _attention(self, dtype: torch.dtype, size: int) -> PagedAttention:
        """Decoding first, which settles the window; then chunks; then whether fresh prompts go packed."""
        fixed = self._settings.decode_window
        windows = _WINDOWS if fixed is None else (fixed,)
        name = f"paged_attention {size}"
        prefills = self._ways("flash_attention", dtype)

        def decoding() -> Iterator[tuple[str, tuple[Call, int, bool]]]:
            for way in self._ways("single_query_cached_kv_attn", dtype):
                for window in windows:
                    for views in (True, False):
                        how = f"{way.how}, windows {window} for none, {_views(views)}"
                        yield how, (way, window, views)

        def attention(prefill: Call, found: tuple[Call, int, bool], **options: Any) -> PagedAttention:
            decode, window, _ = found
            return PagedAttention(
                prefill=prefill, decode=decode, window=window, compute_dtype=self._compute_dtype, **options
            )

        def decodes(bench: Bench, found: tuple[Call, int, bool]) -> None:
            kernel = attention(prefills[0], found, packed=False, views=found[2])
            trials.paged_attention(size, _DECODING)(bench, kernel)

        def reads_tables(bench: Bench, kernel: PagedAttention) -> None:
            trials.paged_attention(size, _CHUNKS)(bench, kernel)
            trials.paged_attention(size, [(1, 7), *_CHUNKS, *_DECODING])(bench, kernel)

        found = self._first(f"{name} decoding", dtype, decoding(), decodes)
        paged = self._first(
            f"{name} over tables",
            dtype,
            (
                (f"{way.how}, {_views(views)}", attention(way, found, packed=False, views=views))
                for way in prefills
                for views in ((True, False) if found[2] else (False,))
            ),
            reads_tables,
        )
        # Fresh prompts as every public caller passes them; else over tables, if that is right for them.
        chosen = next(way for way in prefills if way is paged.prefill)
        return self._first(
            f"{name} of fresh prompts",
            dtype,
            (
                (
                    f"{'packed' if packed else 'over tables'}, {_views(views)}",
                    attention(chosen, found, packed=packed, views=views),
                )
                for packed in (True, False)
                for views in ((True, False) if paged.views else (False,))
            ),
            trials.paged_attention(size, _FRESH),
        )

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.float16 if self._settings.half_softmax else torch.float32

    def _ways(self, function: str, dtype: torch.dtype) -> list[Call]:
        name = str(dtype).removeprefix("torch.")
        if name not in FUNCTIONS[function].dtypes | ({"float32"} if self._settings.float32 else set()):
            raise Declined(f"{_NOT_LISTED} {name} for {function}")
        if function not in self._ops.calls:
            raise Declined(
                self._ops.missing or self._ops.refused.get(function, f"{PACKAGE} has no {function}")
            )
        return self._ops.calls[function]

    def _with_activations(
        self, name: str, dtype: torch.dtype, plain: Product, check: Callable[[Product, Activation], None]
    ) -> Product:
        """A product with each activation that it applies rightly itself, or that ``active`` applies."""
        key = (name, "with activations", dtype)
        if key not in self._kept:
            fused: dict[Activation, str] = {}
            separate: dict[Activation, Callable[[Tensor], Tensor]] = {}
            for activation in _ACTIVATIONS:
                for mode in _spellings(activation, _OF_PRODUCTS) if self._settings.fused_activation else ():
                    candidate = Product(
                        call=plain.call,
                        no_activation=plain.no_activation,
                        bias_rows=plain.bias_rows,
                        fused={activation: mode},
                    )
                    try:
                        if self._settings.measure:
                            check(candidate, activation)
                        elif mode != activation:
                            continue
                    except Exception as error:
                        logger.debug("%s with %s as %s: %s", name, activation, mode, error)
                        continue
                    fused[activation] = mode
                    break
                if activation not in fused:
                    try:
                        separate[activation] = self.act(dtype, activation)
                    except Declined:
                        continue
            self._kept[key] = Product(
                call=plain.call,
                no_activation=plain.no_activation,
                bias_rows=plain.bias_rows,
                fused=fused,
                separate=separate,
            )
            self.notes[_label(name, dtype)] += f", applying {', '.join(fused) or 'no activation'}"
        found: Product = self._kept[key]
        return found

    def _first(
        self,
        name: str,
        dtype: torch.dtype,
        candidates: Iterable[tuple[str, K]],
        trial: Callable[[Bench, K], None],
        *,
        decisive: bool = True,
    ) -> K:
        """The first candidate that is right, or, without measuring, the first.

        Raises:
            Declined: none is.
        """
        key = (name, dtype)
        if key not in self._kept:
            try:
                self._kept[key] = self._tried(name, dtype, candidates, trial)
            except Declined as error:
                self._kept[key] = error
                self._note(_label(name, dtype), str(error), decisive=decisive)
        found: K = self._given(self._kept[key])
        return found

    def _note(self, label: str, why: str, *, decisive: bool = True) -> None:
        """A kernel that does not work is a fault; one that the manual does not promise is none."""
        if not decisive or why.startswith(_NOT_LISTED):
            self.notes[label] = f"not used: {why}"
        elif label not in self.declined:
            self.declined[label] = why
            logger.warning("%s is not used: %s", label, why)

    def _tried(
        self,
        name: str,
        dtype: torch.dtype,
        candidates: Iterable[tuple[str, K]],
        trial: Callable[[Bench, K], None],
    ) -> K:
        bench = Bench(self._device, dtype)
        reasons: list[str] = []
        for how, candidate in candidates:
            if self._settings.measure:
                try:
                    with torch.inference_mode():
                        trial(bench, candidate)
                except Exception as error:  # wrong, or whatever a vendor's kernel raises
                    reasons.append(f"{how}: {_short(error)}")
                    continue
            self.notes[_label(name, dtype)] = how
            return candidate
        raise Declined(f"tried {'; '.join(reasons)}" if reasons else "the manual knows no such mode")

    @staticmethod
    def _given(kept: Any) -> Any:
        if isinstance(kept, Declined):
            raise kept
        return kept


_NOT_LISTED = f"the manual of {PACKAGE} does not list"


def _label(name: str, dtype: torch.dtype) -> str:
    return f"{name} in {str(dtype).removeprefix('torch.')}"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, Wrong) else f"{type(error).__name__}: {text}"


def _views(views: bool) -> str:
    return "views taken as they are" if views else "copies of views"


def _spellings(activation: Activation, listed: frozenset[str]) -> tuple[str, ...]:
    """What the package may call an activation: nobody says whether its gelu is the exact one."""
    mode = "gelu" if activation == "gelu_tanh" else activation
    return (mode,) if mode in listed else ()


def _act(way: Call, mode: str, x: Tensor) -> Tensor:
    given: Tensor = way(input=x.contiguous(), act_mode=mode, is_gated=False)
    return given


def _product_ways(way: Call) -> Iterator[tuple[str, Product]]:
    """Without an activation the mode is left out, "none", or None; a bias is (N,) or (1, N)."""
    for bias_rows in (False, True):
        for mode in (None, "none", ""):
            shape = "(1, N)" if bias_rows else "(N,)"
            told = "no act_mode" if mode is None else f"act_mode {mode!r}"
            yield (
                f"{way.how}, bias {shape}, {told}",
                Product(call=way, no_activation=mode, bias_rows=bias_rows),
            )


def _floats(product: Product) -> trials.Prepare:
    return lambda weight, bias, activation: product.linear({"b": weight}, len(weight), bias, activation)


def _quantized(bench: Bench, product: Product, weight: QuantizedWeight, *, low_first: bool) -> trials.Prepare:
    tensors = linear.arguments(weight.to(bench.device), bench.dtype, low_first=low_first)
    return lambda floats, bias, activation: product.linear(tensors, len(floats), bias, activation)


@lru_cache(maxsize=16)
def measured(ops: Ops, settings: Settings, device: str, card: str) -> Measured:
    """What is known of a card, from now on kept.

    Args:
        ops: the package.
        settings: the switches.
        device: torch's name of the card.
        card: the vendor's name of it.
    """
    return Measured(ops, settings, device)
