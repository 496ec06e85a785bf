"""vLLM's own model classes under their own names, which in addition tell kvtier where the loaded model is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models import llama, mistral, qwen2, qwen3

from kvtier.connectors.vllm.model_access import note_loaded

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class LlamaForCausalLM(llama.LlamaForCausalLM):
    """Llama and what is built like it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        note_loaded(self)


class MistralForCausalLM(mistral.MistralForCausalLM):
    """Mistral."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        note_loaded(self)


class Qwen2ForCausalLM(qwen2.Qwen2ForCausalLM):
    """Qwen2 and 2.5."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        note_loaded(self)


class Qwen3ForCausalLM(qwen3.Qwen3ForCausalLM):
    """Qwen3."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        note_loaded(self)
