"""kvtier inside vLLM. Name this module as ``kv_connector_module_path`` and ``KVTierConnector`` as ``kv_connector``."""

from kvtier.connectors.vllm.connector import KVTierConnector

__all__ = ["KVTierConnector"]
