"""kvtier inside vLLM. Name this module as ``kv_connector_module_path`` and ``KVTierConnector`` as ``kv_connector``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvtier.connectors.vllm.connector import KVTierConnector

__all__ = ["KVTierConnector"]


def __getattr__(name: str) -> object:
    # The connector needs vLLM; the table of differences beside it must be readable without.
    if name == "KVTierConnector":
        return import_module("kvtier.connectors.vllm.connector").KVTierConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
