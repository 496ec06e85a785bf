"""kvtier keeps the KV cache of an LLM engine alive beyond GPU memory and gives it back when the same tokens come again.

The names below are the public API; everything else may change between versions. Importing kvtier imports none of its
dependencies: `Config`, `CacheEngine`, `Namespace` and `KeyChain` are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvtier.errors import (
    ArenaError,
    BlendRefusedError,
    ClosedError,
    ConfigError,
    InvariantError,
    KVTierError,
    TierBusyError,
    TierError,
    TierFormatError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from kvtier.config import Config
    from kvtier.engine import CacheEngine
    from kvtier.hashing import KeyChain, Namespace

__version__ = "0.1.0"

__all__ = [
    "ArenaError",
    "BlendRefusedError",
    "CacheEngine",
    "ClosedError",
    "Config",
    "ConfigError",
    "InvariantError",
    "KVTierError",
    "KeyChain",
    "Namespace",
    "TierBusyError",
    "TierError",
    "TierFormatError",
    "UnsupportedModelError",
    "__version__",
]

_LAZY = {
    "Config": "kvtier.config",
    "CacheEngine": "kvtier.engine",
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
