"""opsin runs vision-language models; model families and devices are plugins.

Importing this package is cheap: every public name is imported when it is first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.async_engine import AsyncEngine
    from opsin.config import EngineArgs, EngineConfig
    from opsin.engine.engine import Engine
    from opsin.errors import BatchInterrupted
    from opsin.hookspecs import hookimpl
    from opsin.llm import LLM
    from opsin.params import (
        BeamSearchParams,
        GuidedDecodingParams,
        PoolingParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutput,
        StructuredOutputsParams,
    )
    from opsin.results import CompletionOutput, PoolingRequestOutput, RequestOutput, ScoringRequestOutput

__version__ = "0.1.0"

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    # How long OpenMP's threads spin before they sleep, read when torch is loaded. Its own 300,000 turns are
    # milliseconds that a busy neighbour's core is waited for: docs/decisions/0024-cpu-threads.md.
    os.environ["GOMP_SPINCOUNT"] = "3000"

_HOME = {
    "LLM": "opsin.llm",
    "AsyncEngine": "opsin.async_engine",
    "BatchInterrupted": "opsin.errors",
    "BeamSearchParams": "opsin.params",
    "CompletionOutput": "opsin.results",
    "Engine": "opsin.engine.engine",
    "EngineArgs": "opsin.config",
    "EngineConfig": "opsin.config",
    "GuidedDecodingParams": "opsin.params",
    "PoolingParams": "opsin.params",
    "PoolingRequestOutput": "opsin.results",
    "RequestOutput": "opsin.results",
    "RequestOutputKind": "opsin.params",
    "SamplingParams": "opsin.params",
    "ScoringRequestOutput": "opsin.results",
    "StructuredOutput": "opsin.params",
    "StructuredOutputsParams": "opsin.params",
    "hookimpl": "opsin.hookspecs",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BatchInterrupted",
    "BeamSearchParams",
    "CompletionOutput",
    "Engine",
    "EngineArgs",
    "EngineConfig",
    "GuidedDecodingParams",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringRequestOutput",
    "StructuredOutput",
    "StructuredOutputsParams",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'opsin' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # next time it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
