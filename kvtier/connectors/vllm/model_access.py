"""Where the model is that vLLM has loaded in this process, for kvtier's worker half."""

from __future__ import annotations

import weakref
from typing import Any

_loaded: list[weakref.ref[Any]] = []


def note_loaded(model: Any) -> None:
    """Remembers the model of this worker; a draft model that is loaded later does not replace it."""
    _loaded.append(weakref.ref(model))


def loaded_model() -> Any | None:
    """The first model that was loaded in this process and is still alive."""
    alive = [model for reference in _loaded if (model := reference()) is not None]
    _loaded[:] = [weakref.ref(model) for model in alive]
    return alive[0] if alive else None
