"""The communication backend ``cncl``: gloo over the host memory behind mlu tensors."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tests.mlu_sim.tensors import alias


def _host(tensors: list[Tensor]) -> list[Tensor]:
    return [alias(x) for x in tensors]


class SimulatedCNCL(dist.ProcessGroup):
    """What opsin needs of it, and what torch.distributed calls on the way."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

    def getBackendName(self) -> str:
        return "cncl"

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._gloo.allreduce(_host(tensors), opts or dist.AllreduceOptions())

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._gloo.broadcast(_host(tensors), opts or dist.BroadcastOptions())

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        return self._gloo.allgather([_host(output) for output in outputs], _host(inputs))

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier()


def register() -> None:
    """Make ``backend="cncl"`` known, for tensors on mlu."""
    if dist.is_available():
        dist.Backend.register_backend("cncl", SimulatedCNCL, devices=["mlu"])
