"""What public text leaves open about the card's kernels: each reading is a switch of the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass
class Switches:
    """One reading of the open questions. The defaults are the manual's, and the stricter where it is silent.

    Attributes:
        window: what means "no window" to decoding: ``"-1"`` (the manual; a right one of 0 or more is
            refused), ``"0"`` (callers of 2024; others are refused), ``"both"``.
        rotary: where the result stands: ``"in place"``, ``"elsewhere"`` (returned; the input stays) or
            ``"only in place"`` (nothing is returned).
        rows: of rotary's input that are further apart than they are long: ``"right"``, or ``"ignored"``.
        float32: in norms, rotary and cache writing: ``"refused"``, or ``"right"``.
        one_column: a block table of one column: ``"not paged"``, as the manual says, or ``"paged"``.
        views: keys, values and queries with rows that are further apart: ``"taken"``, ``"refused"`` or
            ``"ignored"`` (wrong numbers).
        tail: unwritten slots of a block: ``"skipped"``, or ``"loaded"`` (NaN there ends in the result).
        gelu: ``"exact"`` or ``"tanh"``.
        memory: fresh memory holds ``"zeros"`` or ``"NaN"``.
        names: arguments as callers know them (``"known"``), as the manual prints them (``"printed"``), behind
            a decorator (``"hidden"``), or not told at all (``"untold"``, ``"untold printed"``).
        halves: an even input's code of 4 bits stands in the ``"low"`` or ``"high"`` half of a byte.
        bias: of matmul: ``"any"``, or ``"rows"`` (1, N).
        angles: sines and cosines beyond 2 pi: ``"right"`` or ``"rough"``.
    """

    window: Literal["-1", "0", "both"] = "-1"
    rotary: Literal["in place", "elsewhere", "only in place"] = "in place"
    rows: Literal["right", "ignored"] = "right"
    float32: Literal["refused", "right"] = "refused"
    one_column: Literal["not paged", "paged"] = "not paged"
    views: Literal["taken", "refused", "ignored"] = "taken"
    tail: Literal["skipped", "loaded"] = "skipped"
    gelu: Literal["exact", "tanh"] = "exact"
    memory: Literal["zeros", "NaN"] = "NaN"
    names: Literal["known", "printed", "hidden", "untold", "untold printed"] = "known"
    halves: Literal["low", "high"] = "low"
    bias: Literal["any", "rows"] = "any"
    angles: Literal["right", "rough"] = "right"

    def set(self, **values: str) -> None:
        """Another reading, in place.

        Raises:
            ValueError: there is no such switch.
        """
        for name, value in values.items():
            if name not in asdict(self):
                raise ValueError(f"no switch {name!r}: there are {', '.join(asdict(self))}")
            setattr(self, name, value)

    @contextmanager
    def changed(self, **values: str) -> Iterator[None]:
        """Another reading inside the block."""
        before = asdict(self)
        self.set(**values)
        try:
            yield
        finally:
            self.set(**before)


SWITCHES = Switches()
"""The reading of this process."""

EACH: tuple[dict[str, str], ...] = (
    {},
    {"window": "0"},
    {"window": "both"},
    {"rotary": "elsewhere"},
    {"rotary": "only in place"},
    {"rows": "ignored"},
    {"float32": "right"},
    {"one_column": "paged"},
    {"views": "refused"},
    {"views": "ignored"},
    {"tail": "loaded"},
    {"gelu": "tanh"},
    {"memory": "zeros"},
    {"names": "printed"},
    {"names": "hidden"},
    {"names": "untold"},
    {"names": "untold printed"},
    {"bias": "rows"},
    {"angles": "rough"},
    {"window": "0", "rotary": "elsewhere", "views": "refused", "gelu": "tanh", "names": "hidden"},
    {"rotary": "only in place", "rows": "ignored", "views": "ignored", "tail": "loaded", "names": "printed"},
)
"""Each switch by itself, and two readings in which several are thrown."""
