"""What of a vLLM request decides which keys its blocks have, and what it asked of kvtier."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from vllm.v1.request import Request

from kvtier.connectors.messages import RequestOptions
from kvtier.connectors.options import parse_options
from kvtier.connectors.requests import RequestIdentity
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
        extras.append(f"lora {adapter.lora_name}\0{adapter.lora_int_id}\0{adapter.lora_path}".encode())
    if request.cache_salt:
        extras.append(salt_extra(request.cache_salt))
    spans = tuple(
        TokenSpan(feature.mm_position.offset, feature.mm_position.length, feature.identifier.encode())
        for feature in request.mm_features or ()
    )
    if options.tenant:
        extras.append(tenant_extra(options.tenant))
    tenant = options.tenant or request.cache_salt or (adapter.lora_name if adapter is not None else "")
    return RequestIdentity(tuple(extras), spans, tenant, adapter is not None)


def options_of(request: Request) -> RequestOptions:
    """``kv_transfer_params["kvtier"]`` of a request (:mod:`kvtier.connectors.options`). What makes no sense is left out and said once.

    A request that must see its whole prompt computed (``skip_reading_prefix_cache``: prompt log-probabilities, pooling) loads nothing.
    """
    params = request.kv_transfer_params
    options, problems = parse_options(params.get(_KEY, {}) if isinstance(params, Mapping) else {})
    for problem in problems:
        _warn_once(f"kv_transfer_params[{_KEY!r}]{problem if problem.startswith('[') else ' is ' + problem}")
    if getattr(request, "prompt_embeds", None) is not None:
        options = dataclasses.replace(options, load=False, store=False)  # no token ids, so no keys
    if request.skip_reading_prefix_cache:
        options = dataclasses.replace(options, load=False)
    return options


def _warn_once(message: str) -> None:
    if message not in _warned and len(_warned) < 100:
        _warned.add(message)
        _LOG.warning("%s; ignored", message)
