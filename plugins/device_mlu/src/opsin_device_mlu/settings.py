"""What no public source settles about MLU370 and its software, as ``OPSIN_MLU_*`` variables.

Each has a default that is the safe reading of docs/devices/mlu370.md, is shown by ``opsin doctor``, and can
be changed by whoever has a card and sees otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

PREFIX = "OPSIN_MLU_"

HEAD_SIZES = (32, 64, 96, 128, 160, 192, 224, 256)
"""Those every known caller of these kernels uses (vLLM pull request 10315). Others are padded."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The switches.

    Attributes:
        ops: use torch_mlu_ops at all.
        measure: try each kernel on a small case before it is used; otherwise the first way to call it is
            taken for right.
        trust_signatures: call torch_mlu_ops in the order that callers are known to use, whatever the names of
            its arguments are.
        decode_window: what means "no window" to the decoding kernel: 0 or -1; None: -1, or 0 where that is
            measured to be right.
        head_sizes: head sizes the attention kernels take as they are, ascending.
        rotary_in_place: rotate q and k where they stand in the fused projection, without a copy, where that
            is measured to be right.
        fused_activation: let matmul apply the activations that it is measured to apply rightly.
        float32: try float32 also where the manual lists float16 and bfloat16 only.
        half_softmax: let attention compute in float16 instead of float32.
        pinned_memory: hand numbers over in pinned host memory; None: where there is such memory.
        graphs: declared in the device's capabilities; the core does not use them yet.
    """

    ops: bool = True
    measure: bool = True
    trust_signatures: bool = False
    decode_window: int | None = None
    head_sizes: tuple[int, ...] = HEAD_SIZES
    rotary_in_place: bool = True
    fused_activation: bool = True
    float32: bool = False
    half_softmax: bool = False
    pinned_memory: bool | None = None
    graphs: bool = False

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """From ``OPSIN_MLU_<NAME>`` variables.

        Raises:
            ValueError: a variable has a value that cannot be, or there is no such switch.
        """
        given = os.environ if environment is None else environment
        known = {f"{PREFIX}{field.name.upper()}": field.name for field in fields(cls)}
        found: dict[str, object] = {}
        for variable, text in given.items():
            if not variable.startswith(PREFIX):
                continue
            if variable not in known:
                raise ValueError(f"{variable} is no switch of this device; there are: {', '.join(known)}")
            name = known[variable]
            found[name] = _PARSERS.get(name, _flag)(variable, text.strip())
        return cls(**found)  # type: ignore[arg-type]

    def changed(self) -> dict[str, str]:
        """Variable -> value, of the switches that are not at their defaults."""
        default = Settings()
        return {
            f"{PREFIX}{field.name.upper()}": str(getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        }


def _flag(variable: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"{variable}={text!r}: expected 0 or 1")
    return text == "1"


def _window(variable: str, text: str) -> int | None:
    if text not in ("auto", "0", "-1"):
        raise ValueError(f"{variable}={text!r}: expected auto, 0 or -1")
    return None if text == "auto" else int(text)


def _maybe(variable: str, text: str) -> bool | None:
    return None if text == "auto" else _flag(variable, text)


def _sizes(variable: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= 256 for part in parts):
        raise ValueError(f"{variable}={text!r}: expected head sizes up to 256 such as 64,96,128")
    return tuple(sorted({int(part) for part in parts}))


_PARSERS: Mapping[str, Callable[[str, str], object]] = {
    "decode_window": _window,
    "head_sizes": _sizes,
    "pinned_memory": _maybe,
}
