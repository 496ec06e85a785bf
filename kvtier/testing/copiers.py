"""A copier that fails or takes its time, around a real one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvtier.copy.base import BlockCopier, BlockCopy, CopyEvent


class InjectedCopyError(RuntimeError):
    """The failure that was asked for."""


class FaultyCopier:
    """Passes copies on to ``inner``, at once or when they are waited for, and lets some of them fail.

    With ``num_polls`` above 0 it is asynchronous: nothing moves before ``done()`` was asked that often or ``wait()`` was
    called, so whatever must stay untouched until then really must.
    """

    def __init__(self, inner: BlockCopier, *, num_polls: int = 0) -> None:
        self.inner = inner
        self.is_async = num_polls > 0
        self.num_polls = num_polls
        self.load_faults: deque[str] = deque()
        """what happens to the next loads: "start" (raises at once), "end" (the event raises), "none\""""
        self.store_faults: deque[str] = deque()
        self.num_failed = 0

    def gather(self, copies: Sequence[BlockCopy]) -> CopyEvent:
        return self._copy(self.inner.gather, copies, self.store_faults)

    def scatter(self, copies: Sequence[BlockCopy]) -> CopyEvent:
        return self._copy(self.inner.scatter, copies, self.load_faults)

    def heal(self) -> None:
        """Nothing fails from now on."""
        self.load_faults.clear()
        self.store_faults.clear()

    def _copy(self, move: Callable[[Sequence[BlockCopy]], CopyEvent], copies: Sequence[BlockCopy], faults: deque[str]) -> CopyEvent:
        fault = faults.popleft() if faults else "none"
        if fault != "none":
            self.num_failed += 1
        if fault == "start":
            raise InjectedCopyError("could not be started")
        late = _LateCopy(lambda: move(copies), self.num_polls, fails=fault == "end")
        if not self.num_polls and fault == "none":
            late.wait()
        return late


class _LateCopy:
    """A copy that runs when somebody insists."""

    def __init__(self, run: Callable[[], CopyEvent], num_polls: int, *, fails: bool) -> None:
        self._run: Callable[[], CopyEvent] | None = run
        self._num_polls = num_polls
        self._fails = fails

    def done(self) -> bool:
        self._num_polls -= 1
        if self._run is not None and self._num_polls > 0:
            return False
        self.wait()
        return True

    def wait(self) -> None:
        if self._fails:
            raise InjectedCopyError("did not arrive")
        run, self._run = self._run, None
        if run is not None:
            run().wait()
