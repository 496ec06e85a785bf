"""Entry point of the group ``vllm.general_plugins``: makes the connector, and the models it needs, known by name in every process of vLLM.

docs/explanation/decisions.md says why the models are reached this way.
"""

from __future__ import annotations

NAME = "KVTierConnector"
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
"""Those of the families that chunks can be reused with, and vLLM's module of each."""


def register() -> None:
    """Registers connector and models. Imports neither; may run several times in a process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415 - only where vLLM is
    from vllm.model_executor.models.registry import ModelRegistry  # noqa: PLC0415 - as above

    if NAME in KVConnectorFactory._registry:
        return
    KVConnectorFactory.register_connector(NAME, "kvtier.connectors.vllm.connector", NAME)
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"kvtier.connectors.vllm.model_choice:{name}")
