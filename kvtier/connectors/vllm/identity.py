"""What of a vLLM request decides which keys its blocks have, and what it asked of kvtier."""

from __future__ import annotations

import logging

from vllm.v1.request import Request

from kvtier.connectors.messages import RequestOptions
from kvtier.connectors.requests import RequestIdentity
from kvtier.hashing import TokenSpan, salt_extra

_LOG = logging.getLogger(__name__)
_KEY = "kvtier"
_warned: set[str] = set()


def identity_of(request: Request) -> RequestIdentity:
    """Adapter and cache salt separate whole requests; multimodal items the blocks they lie in and all behind.

    The tenant is the salt, or where there is none the adapter's name.
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
    tenant = request.cache_salt or (adapter.lora_name if adapter is not None else "")
    return RequestIdentity(tuple(extras), spans, tenant)


def options_of(request: Request) -> RequestOptions:
    """``kv_transfer_params["kvtier"]`` of a request: ``load`` and ``store``. What makes no sense is ignored and said once.

    A request that must see its whole prompt computed (``skip_reading_prefix_cache``: prompt log-probabilities, pooling) loads nothing.
    """
    if getattr(request, "prompt_embeds", None) is not None:
        return RequestOptions(load=False, store=False)  # no token ids, so no keys
    may_load = not request.skip_reading_prefix_cache
    asked = (request.kv_transfer_params or {}).get(_KEY, {})
    if not isinstance(asked, dict):
        _warn_once(f"kv_transfer_params[{_KEY!r}] is {asked!r}; allowed: a mapping with load and store")
        return RequestOptions(load=may_load)
    chosen = {"load": True, "store": True}
    for name, value in asked.items():
        if name in chosen and isinstance(value, bool):
            chosen[name] = value
        else:
            _warn_once(f"kv_transfer_params[{_KEY!r}][{name!r}] is {value!r}; allowed: load and store, true or false")
    return RequestOptions(load=chosen["load"] and may_load, store=chosen["store"])


def _warn_once(message: str) -> None:
    if message not in _warned and len(_warned) < 100:
        _warned.add(message)
        _LOG.warning("%s; ignored", message)
