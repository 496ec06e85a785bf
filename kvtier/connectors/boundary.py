"""The one place where an unexpected error inside kvtier stops before it reaches an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType

_LOG = logging.getLogger(__name__)


class Boundary:
    """Swallows, counts and logs what escapes from a ``with`` block; the caller has set the safe answer before.

    >>> boundary = Boundary(on_error=lambda: None)
    >>> answer = 0
    >>> with boundary.at("match"):
    ...     answer = 1 // 0
    >>> answer
    0

    Each kind of error (place and type) is logged once, with its traceback.  ``strict`` lets errors through, for tests.  ``is_fatal`` is
    asked whether other processes would wait for good for what was broken off: then this one ends (SystemExit).  An engine notices that at
    once, but of an error only when the others have answered, too.
    """

    __slots__ = ("_is_fatal", "_logged", "_on_error", "_strict")

    def __init__(self, *, on_error: Callable[[], None], strict: bool = False, is_fatal: Callable[[], bool] = bool) -> None:
        self._on_error = on_error
        self._strict = strict
        self._is_fatal = is_fatal
        self._logged: set[tuple[str, type[BaseException]]] = set()

    def at(self, place: str) -> _Crossing:
        """A context manager that lets no :class:`Exception` out. ``place`` names it in the log."""
        return _Crossing(self, place)

    def caught(self, place: str, error: BaseException, traceback: TracebackType | None) -> bool:
        """Counts and logs an error. Returns whether it ends here."""
        self._on_error()
        if self._is_fatal():
            _LOG.critical("error in %s, which other processes wait for: this one ends", place, exc_info=(type(error), error, traceback))
            raise SystemExit(1) from error
        if self._strict:
            return False
        if (place, type(error)) not in self._logged:
            self._logged.add((place, type(error)))
            _LOG.error("unexpected error in %s becomes a miss; reported once", place, exc_info=(type(error), error, traceback))
        return True


class _Crossing:
    """One ``with`` block. A class, not a generator: it is entered several times per engine step."""

    __slots__ = ("_boundary", "_place")

    def __init__(self, boundary: Boundary, place: str) -> None:
        self._boundary = boundary
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        # Like ``except Exception``: a KeyboardInterrupt or SystemExit goes through.
        return isinstance(error, Exception) and self._boundary.caught(self._place, error, traceback)
