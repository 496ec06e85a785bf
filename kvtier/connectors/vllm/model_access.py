"""Hands the model that vLLM has loaded to kvtier's worker half: registration with vLLM's ``ModelRegistry``, and where the model is then.

docs/explanation/decisions.md says why this way.
"""

from __future__ import annotations

import weakref
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""those of the families that chunks can be reused with"""

_loaded: list[weakref.ref[Any]] = []
_registered: set[str] = set()


def register_models() -> None:
    """Lets vLLM load these architectures through kvtier's subclasses. Imports none of them; may run several times in a process."""
    from vllm.model_executor.models.registry import ModelRegistry  # noqa: PLC0415 - only where vLLM is

    for name in ARCHITECTURES:
        if name not in _registered:
            _registered.add(name)
            ModelRegistry.register_model(name, f"kvtier.connectors.vllm.models:{name}")


def note_loaded(model: Any) -> None:
    """Remembers the model of this worker; a draft model that is loaded later does not replace it."""
    _loaded.append(weakref.ref(model))


def loaded_model() -> Any | None:
    """The first model that was loaded in this process and is still alive."""
    alive = [model for reference in _loaded if (model := reference()) is not None]
    _loaded[:] = [weakref.ref(model) for model in alive]
    return alive[0] if alive else None
