"""Speculative decoding: which drafters there are, as far as it matters to KV that is kept.

Drafts are verified by the model, so KV of a drafter that is missing or wrong costs accepted drafts and never gives a wrong token.
"""

from __future__ import annotations

from vllm.config import VllmConfig

_WITHOUT_KV = frozenset({"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"})
"""methods that draft from the tokens or from the last hidden state"""
_NO_DRAFTERS = frozenset({"extract_hidden_states"})
"""methods whose layers hold something else than KV, for a connector of their own"""


def refused_method(vllm_config: VllmConfig) -> str:
    """The method of speculative decoding that cannot be served; empty: there is none."""
    method = _method(vllm_config)
    return method if method in _NO_DRAFTERS else ""


def drafter_of(vllm_config: VllmConfig) -> str:
    """Names the drafter where it has KV of its own, which then lies in the engine's blocks beside the model's; empty: it has none.

    A method that is not known counts as one that has.
    """
    speculative, method = vllm_config.speculative_config, _method(vllm_config)
    if speculative is None or method in _WITHOUT_KV:
        return ""
    return f"{method} {speculative.model} {speculative.revision or ''}".strip()


def _method(vllm_config: VllmConfig) -> str:
    speculative = vllm_config.speculative_config
    return "" if speculative is None else str(speculative.method)
