"""opsin runs vision-language models; model families and devices are plugins.

Importing this package is cheap: every public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.async_engine import AsyncEngine
    from opsin.config import BeamSearchParams, EngineConfig, PoolingParams, SamplingParams
    from opsin.engine.engine import Engine
    from opsin.hookspecs import hookimpl
    from opsin.llm import LLM
    from opsin.results import CompletionOutput, RequestOutput

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "hookimpl",
]

_HOME = {
    "LLM": "opsin.llm",
    "AsyncEngine": "opsin.async_engine",
    "BeamSearchParams": "opsin.config",
    "CompletionOutput": "opsin.results",
    "Engine": "opsin.engine.engine",
    "EngineConfig": "opsin.config",
    "PoolingParams": "opsin.config",
    "RequestOutput": "opsin.results",
    "SamplingParams": "opsin.config",
    "hookimpl": "opsin.hookspecs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'opsin' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # next time it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
