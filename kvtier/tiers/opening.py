"""A tier opens as a whole or leaves nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kvtier.errors import TierError


@contextlib.contextmanager
def opening(what: str) -> Iterator[contextlib.ExitStack]:
    """Gives out a stack of what is to be undone, the last first, where the block raises.

    What the system refuses meanwhile becomes a TierError about ``what``.
    """
    with contextlib.ExitStack() as undo:
        try:
            yield undo
        except TierError:
            raise
        except OSError as error:
            raise TierError(f"{what} cannot be opened: {error}") from error
        undo.pop_all()
