"""The compiled core, or its pure-Python twins where it is missing or was built from other sources.

A core of another ABI version is never used: it is a left-over build. Then, and where there is none although
``KVTIER_REQUIRE_NATIVE=1`` is set, the import warns or fails.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType

from kvtier import _fallback

ABI_VERSION = 4
"""what this package expects of ``kvtier._core``; grows with every change of a signature or a meaning"""


def _load_core() -> ModuleType | None:
    """The compiled core if it fits. Raises ImportError where it is required and does not."""
    is_required = os.environ.get("KVTIER_REQUIRE_NATIVE") == "1"
    try:
        from kvtier import _core  # noqa: PLC0415 - it may be missing
    except ImportError as error:
        if is_required:
            raise ImportError(f"kvtier's compiled core is required (KVTIER_REQUIRE_NATIVE=1) and does not load: {error}") from error
        return None
    if getattr(_core, "ABI_VERSION", None) == ABI_VERSION:
        return _core
    message = f"{_core.__file__} is a left-over of another version of kvtier and is not used; build kvtier again"
    if is_required:
        raise ImportError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return None


_core_or_none = _load_core()
is_native = _core_or_none is not None
"""whether the compiled core is in use"""

if _core_or_none is not None:
    chain_keys = _core_or_none.chain_keys
    copy_blocks = _core_or_none.copy_blocks
    receive = _core_or_none.receive
    ring_close = _core_or_none.ring_close
    ring_open = _core_or_none.ring_open
    ring_register = _core_or_none.ring_register
    ring_submit = _core_or_none.ring_submit
    ring_wait = _core_or_none.ring_wait
    ring_wake = _core_or_none.ring_wake
else:
    chain_keys = _fallback.chain_keys
    copy_blocks = _fallback.copy_blocks
    receive = _fallback.receive
    ring_close = _fallback.ring_close
    ring_open = _fallback.ring_open
    ring_register = _fallback.ring_register
    ring_submit = _fallback.ring_submit
    ring_wait = _fallback.ring_wait
    ring_wake = _fallback.ring_wake

__all__ = [
    "ABI_VERSION",
    "chain_keys",
    "copy_blocks",
    "is_native",
    "receive",
    "ring_close",
    "ring_open",
    "ring_register",
    "ring_submit",
    "ring_wait",
    "ring_wake",
]
