"""opsin and transformers, as `sides` has them, with the settings of a row."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sides
from workloads import Request, Workload

from peers.catalogue import MAX_MODEL_LEN
from peers.measured import Result


class Opsin:
    """`opsin.LLM` with any settings."""

    def __init__(self, model: Path, settings: Mapping[str, Any], threads: int) -> None:  # noqa: ARG002
        self._side = sides.OpsinSide(model, max_model_len=MAX_MODEL_LEN, **settings)

    def run(self, workload: Workload, requests: Sequence[Request]) -> Result:
        """See `PeerSide.run`."""
        return _result(self._side.run(workload, requests))

    def about(self) -> dict[str, str]:
        """Version, and the type it computes in."""
        version = importlib.metadata.version("opsin")
        return {"version": f"opsin {version}", "computes in": self._side.llm.engine.resolved.dtype}


class Transformers:
    """``generate`` in the row's dtype."""

    def __init__(self, model: Path, settings: Mapping[str, Any], threads: int) -> None:  # noqa: ARG002
        self._side = sides.TransformersSide(model, settings["dtype"])

    def run(self, workload: Workload, requests: Sequence[Request]) -> Result:
        """See `PeerSide.run`."""
        return _result(self._side.run(workload, requests))

    def about(self) -> dict[str, str]:
        """Version, and the type it computes in."""
        version = importlib.metadata.version("transformers")
        dtype = str(self._side.model.dtype).removeprefix("torch.")
        return {"version": f"transformers {version}", "computes in": dtype}


def _result(measured: sides.Measurement) -> Result:
    return Result(
        seconds=measured.seconds,
        token_times=measured.token_times,
        num_prompt_tokens=sum(map(len, measured.prompt_ids)),
        output_ids=measured.output_ids,
    )
