"""kvtier keeps the KV cache of an LLM engine alive beyond GPU memory and gives it back when the same tokens come again.

The names below are the public API; everything else may change between versions. Importing kvtier imports none of its
dependencies: `Config`, `CacheEngine`, `Controller`, `Namespace`, `KeyChain` and `connect` are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvtier.errors import (
    ArenaError,
    BlendRefusedError,
    ClosedError,
    ConfigError,
    ControlError,
    DaemonError,
    InvariantError,
    JobCancelledError,
    JobTimeoutError,
    KVTierError,
    QuotaError,
    RemoteError,
    TierBusyError,
    TierError,
    TierFormatError,
    TraceError,
    UnknownSessionError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from kvtier.config import Config
    from kvtier.control.hints import NextUse, SessionOver, ToolCall, Workflow
    from kvtier.control.steps import StepGraph
    from kvtier.controller import Controller, controllers
    from kvtier.engine import CacheEngine
    from kvtier.hashing import KeyChain, Namespace
    from kvtier.job import Job
    from kvtier.serve.control import connect

__version__ = "0.1.0"

__all__ = [
    "ArenaError",
    "BlendRefusedError",
    "CacheEngine",
    "ClosedError",
    "Config",
    "ConfigError",
    "ControlError",
    "Controller",
    "DaemonError",
    "InvariantError",
    "Job",
    "JobCancelledError",
    "JobTimeoutError",
    "KVTierError",
    "KeyChain",
    "Namespace",
    "NextUse",
    "QuotaError",
    "RemoteError",
    "SessionOver",
    "StepGraph",
    "TierBusyError",
    "TierError",
    "TierFormatError",
    "ToolCall",
    "TraceError",
    "UnknownSessionError",
    "UnsupportedModelError",
    "Workflow",
    "__version__",
    "connect",
    "controllers",
]

_LAZY = {
    "Config": "kvtier.config",
    "CacheEngine": "kvtier.engine",
    "Controller": "kvtier.controller",
    "Job": "kvtier.job",
    "NextUse": "kvtier.control.hints",
    "SessionOver": "kvtier.control.hints",
    "StepGraph": "kvtier.control.steps",
    "ToolCall": "kvtier.control.hints",
    "Workflow": "kvtier.control.hints",
    "connect": "kvtier.serve.control",
    "controllers": "kvtier.controller",
    "Namespace": "kvtier.hashing",
    "KeyChain": "kvtier.hashing",
}


def __getattr__(name: str) -> object:
    """Loads a public name at its first use: these modules import numpy and pydantic, and an engine's plugin scan imports kvtier."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
