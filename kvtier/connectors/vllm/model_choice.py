"""Which class vLLM loads a model with: its own, or kvtier's subclass where this engine reuses chunks.

vLLM is told of this module by name and takes the class from it as an attribute, which is the moment of the choice: a worker does so while
its own configuration is in force. Everybody else gets vLLM's class, and nothing is imported for it that vLLM would not import itself.
"""

from __future__ import annotations

from importlib import import_module

from kvtier.connectors.vllm.plugin import ARCHITECTURES, NAME


def __getattr__(name: str) -> object:
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _reuses_chunks():
        return getattr(import_module("kvtier.connectors.vllm.models"), name)
    return getattr(import_module(f"vllm.model_executor.models.{ARCHITECTURES[name]}"), name)


def _reuses_chunks() -> bool:
    """Whether the engine whose model is being loaded is configured with kvtier and ``blend.enabled``."""
    from vllm.config import get_current_vllm_config_or_none  # noqa: PLC0415 - who lists this module's names needs no vLLM

    from kvtier.config import Config  # noqa: PLC0415 - only where a model is loaded
    from kvtier.errors import ConfigError  # noqa: PLC0415 - as above

    config = get_current_vllm_config_or_none()
    transfer = None if config is None else config.kv_transfer_config
    if transfer is None or transfer.kv_connector != NAME:
        return False
    try:
        return Config.from_mapping(dict(transfer.kv_connector_extra_config)).blend.enabled
    except ConfigError:  # the connector says what is wrong
        return False
