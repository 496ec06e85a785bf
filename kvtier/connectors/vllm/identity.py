"""What of a vLLM request decides which keys its blocks have, and what it asked of kvtier."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.v1.request import Request

from kvtier.connectors.messages import RequestOptions
from kvtier.connectors.options import parse_options
from kvtier.connectors.requests import RequestIdentity
from kvtier.connectors.vllm.weights import adapter_weights
from kvtier.hashing import TokenSpan, salt_extra, tenant_extra

_LOG = logging.getLogger(__name__)
_KEY = "kvtier"
_warned: set[str] = set()


def identity_of(request: Request, options: RequestOptions) -> RequestIdentity:
    """Tenant, adapter and cache salt separate whole requests; multimodal items the blocks they lie in and all behind.

    The tenant is the one that the request names, else the salt, else the adapter's name.
    """
    extras: list[bytes] = []
    adapter = request.lora_request
    if adapter is not None:
        named = f"lora {adapter.lora_name}\0{adapter.lora_int_id}\0{adapter.lora_path}\0{adapter_weights(adapter)}"
        extras.append(named.encode())
    if request.cache_salt:
        extras.append(salt_extra(request.cache_salt))
    if options.tenant:
        extras.append(tenant_extra(options.tenant))
    tenant = options.tenant or request.cache_salt or (adapter.lora_name if adapter is not None else "")
    return RequestIdentity(tuple(extras), spans_of(request), tenant, adapter is not None)


def spans_of(request: Request) -> tuple[TokenSpan, ...]:
    """Where multimodal items lie. A request whose input comes in parts (``resumable``) may get more of them."""
    features = [feature for feature in request.mm_features or () if feature.mm_position.length]
    return tuple(TokenSpan(it.mm_position.offset, it.mm_position.length, it.identifier.encode()) for it in features)


def are_media_numbered(vllm_config: VllmConfig) -> bool:
    """Whether vLLM numbers multimodal items, from one on at each start, in place of hashing them: where no cache of its own asks."""
    media = vllm_config.model_config.multimodal_config
    return media is not None and media.mm_processor_cache_gb == 0 and not vllm_config.cache_config.enable_prefix_caching


def options_of(request: Request, *, are_media_numbered: bool = False) -> RequestOptions:
    """``kv_transfer_params["kvtier"]`` of a request (:mod:`kvtier.connectors.options`). What makes no sense is left out and said once.

    A request that must see its whole prompt computed (``skip_reading_prefix_cache``: prompt log-probabilities, pooling) loads nothing.
    Where multimodal items have numbers for names, nothing is stored from the first one on: another start gives the same numbers to others.
    """
    params = request.kv_transfer_params
    options, problems = parse_options(params.get(_KEY, {}) if isinstance(params, Mapping) else {})
    for problem in problems:
        _warn_once(f"kv_transfer_params[{_KEY!r}]{problem if problem.startswith('[') else ' is ' + problem}")
    if getattr(request, "prompt_embeds", None) is not None:
        options = dataclasses.replace(options, load=False, store=False)  # no token ids, so no keys
    if are_media_numbered and request.resumable:
        options = dataclasses.replace(options, store=False)
    elif are_media_numbered and request.mm_features:
        num_before = min(feature.mm_position.offset for feature in request.mm_features)
        asked = num_before if options.store_only_prefix is None else options.store_only_prefix
        options = dataclasses.replace(options, store_only_prefix=min(asked, num_before))
    if request.skip_reading_prefix_cache:
        options = dataclasses.replace(options, load=False)
    return options


def _warn_once(message: str) -> None:
    if message not in _warned and len(_warned) < 100:
        _warned.add(message)
        _LOG.warning("%s; ignored", message)
