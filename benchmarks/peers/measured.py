"""What a side gives back for one run of a workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from workloads import Request, Workload


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    Attributes:
        seconds: from pictures and texts in memory to texts.
        token_times: seconds from the call to each generated token of the first request; streamed only.
        num_prompt_tokens: of all requests, the pictures' included.
        output_ids: generated token ids of each request.
    """

    seconds: float
    token_times: Sequence[float]
    num_prompt_tokens: int
    output_ids: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run, and how much it was disturbed.

    Attributes:
        result: of the side.
        disturbance: share of the cores that other processes, and other machines on the same processor, used
            meanwhile; None where the system does not tell.
    """

    result: Result
    disturbance: float | None


class PeerSide(Protocol):
    """A loaded model; made from the checkpoint's folder, the row's settings and a number of threads."""

    def run(self, workload: Workload, requests: Sequence[Request]) -> Result:
        """Run all requests at once, greedily, to the full length."""
        ...

    def about(self) -> dict[str, str]:
        """``version`` and ``computes in``."""
        ...
