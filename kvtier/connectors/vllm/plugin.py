"""Entry point of the group ``vllm.general_plugins``: makes the connector known by name in every process of vLLM."""

from __future__ import annotations

import os

NAME = "KVTierConnector"


def register() -> None:
    """Registers the connector. May run several times in a process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415 - only where vLLM is

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvtier.connectors.vllm.connector", NAME)
    if os.environ.get("KVTIER_BLEND") == "1":
        from kvtier.connectors.vllm.model_access import register_models  # noqa: PLC0415 - as above

        register_models()
