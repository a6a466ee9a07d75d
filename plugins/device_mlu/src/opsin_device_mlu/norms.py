"""Norms, gates and rotary positions over torch_mlu_ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opsin.api import Activation


class RmsNorm:
    """`opsin.api.RMSNorm`. ``call`` is ``fused_rms_norm``."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        if residual is None:
            return _norm(self._call, x, weight, None, eps), x
        normed, h = self._call(
            x=x,
            residual=residual.contiguous(),
            gamma=weight,
            beta=None,
            bias=None,
            eps=eps,
            store_output_before_norm=True,
        )
        return normed.view(x.shape), h.view(x.shape)


class LayerNorm:
    """`opsin.api.LayerNorm`. ``call`` is ``fused_layer_norm``."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return _norm(self._call, x.contiguous(), weight, bias, eps)


def _norm(call: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    normed: Tensor = call(
        x=x, residual=None, gamma=weight, beta=bias, bias=None, eps=eps, store_output_before_norm=False
    )
    return normed


class GatedAct:
    """`opsin.api.GatedAct`.

    Args:
        call: ``active``.
        modes: activation -> what it is called there.
    """

    def __init__(self, call: Callable[..., Any], modes: Mapping[Activation, str]) -> None:
        self._call, self._modes = call, modes

    def __call__(self, x: Tensor, activation: Activation) -> Tensor:
        gated: Tensor = self._call(input=x.contiguous(), act_mode=self._modes[activation], is_gated=True)
        return gated


class Rotary:
    """`opsin.api.Rotary`, on q and k joined in one tensor, as the kernel wants them.

    What the kernel returns is the result, wherever it stands; one that returns nothing has worked in place.

    Args:
        call: ``apply_rotary``.
        in_place: if q and k stand beside each other in memory, as a fused projection leaves them, hand them
            over there. The rows of that tensor are further apart than they are long.
        partial: whether tables may be narrower than heads.
    """

    def __init__(self, call: Callable[..., Any], *, in_place: bool, partial: bool = True) -> None:
        self._call, self.in_place, self.partial = call, in_place, partial
        self._seen: tuple[Tensor, Tensor, torch.dtype] | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def fresh(self) -> Rotary:
        """The same for another model: what is kept of a step is kept apart."""
        return Rotary(self._call, in_place=self.in_place, partial=self.partial)

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._in_dtype(cos, sin, q.dtype)
        width, heads = cos.shape[-1], [q.shape[1], k.shape[1]]
        if width < q.shape[-1] and not self.partial:
            rest = [x[..., width:] for x in (q, k)]
            turned = self._rotate(torch.cat((q[..., :width], k[..., :width]), dim=1), cos, sin)
            new_q, new_k = (torch.cat(p, dim=-1) for p in zip(turned.split(heads, dim=1), rest))
            return new_q, new_k
        together = self.in_place and _stand_together(q, k)
        both = _joined(q, k) if together else torch.cat((q, k), dim=1)
        new_q, new_k = self._rotate(both, cos, sin).split(heads, dim=1)
        return new_q, new_k

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (T, heads, D), the tables (T, R): token i takes row i, as one padded sequence of T tokens."""
        result = self._call(
            input=x.unsqueeze(0),
            sin_cache=sin,
            cos_cache=cos,
            position_ids=None,
            cu_seqlens=None,
            interleaved=False,
            discrete=False,
            dynamic_ntk=False,
            max_seqlen=x.shape[0],
        )
        return result.view(x.shape) if isinstance(result, Tensor) else x

    def _in_dtype(self, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The tables in the run dtype. All layers of a step bring the same ones: converted once."""
        seen = self._seen
        if (
            seen is None
            or self._tables is None
            or seen[0] is not cos
            or seen[1] is not sin
            or seen[2] != dtype
        ):
            self._seen = (cos, sin, dtype)
            self._tables = (cos.to(dtype).contiguous(), sin.to(dtype).contiguous())
        return self._tables


def _stand_together(q: Tensor, k: Tensor) -> bool:
    return (
        q.stride() == k.stride()
        and q.stride(-1) == 1
        and q.stride(-2) == q.shape[-1]
        and q.shape[0] > 0
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        and k.storage_offset() == q.storage_offset() + q.shape[1] * q.shape[2]
    )


def _joined(q: Tensor, k: Tensor) -> Tensor:
    return q.as_strided((q.shape[0], q.shape[1] + k.shape[1], q.shape[2]), q.stride(), q.storage_offset())
