"""Which weights a vLLM engine has, beyond the names of its model and adapters."""

from __future__ import annotations

import functools
import logging
import os

import huggingface_hub
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest

from kvtier.connectors.weights import fingerprint

_LOG = logging.getLogger(__name__)


def weights_of(vllm_config: VllmConfig) -> str:
    """What tells an engine's weights from others under its model's name; empty where they are not in files of this machine."""
    if vllm_config.load_config.load_format == "dummy":
        return "dummy"
    model = vllm_config.model_config
    return _read(_local(str(model.model), model.revision, vllm_config.load_config.download_dir))


def adapter_weights(adapter: LoRARequest) -> str:
    """The same of an adapter: as it was when its name, number and path were first seen, unless it is loaded anew each time."""
    if adapter.load_inplace:
        return _read(adapter.lora_path)
    return _first_seen(adapter.lora_name, adapter.lora_int_id, adapter.lora_path)


@functools.lru_cache(maxsize=4096)
def _first_seen(name: str, number: int, path: str) -> str:  # noqa: ARG001 - an adapter of another name or number is loaded anew
    return _read(path)


def _local(model: str, revision: str | None, cache: str | None) -> str:
    """Where a model's files are: its name, where that is a path, else the snapshot in the cache of Hugging Face's hub."""
    if os.path.exists(model):
        return model
    try:
        return str(huggingface_hub.snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of a repository
        return ""


def _read(path: str) -> str:
    try:
        return fingerprint(path) if path else ""
    except OSError as error:
        _LOG.warning("the weights in %s cannot be read (%s): only their name tells them from others", path, error)
        return ""
