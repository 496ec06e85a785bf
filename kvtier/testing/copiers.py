"""A copier that fails or takes its time, around a real one."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from kvtier.copy.base import BlockCopier, BlockCopy, CopyEvent
from kvtier.copy.cpu import FINISHED
from kvtier.copy.layered import ThreadedLayerLoader


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
        if self._run is not None:
            self._run().wait()
            self._run = None

    def released(self) -> bool:
        return self._run is None

    def order_compute(self) -> None:
        self.wait()


class LateLayerLoader:
    """A layer loader that copies a layer when somebody waits for it, never before; ``faults`` are layers at which a load breaks."""

    def __init__(self, inner: ThreadedLayerLoader) -> None:
        self.num_layers = inner.num_layers
        self.faults: deque[int] = deque()
        """for each of the next loads the layer that fails, with all behind it; ``num_layers`` or more: none"""
        self.num_loads = 0
        self._inner = inner

    def scatter_layers(self, copies: Sequence[BlockCopy]) -> list[CopyEvent]:
        self.num_loads += 1
        block_ids = array("q", [copy.block_id for copy in copies])
        offsets = np.array([copy.arena_offset for copy in copies], np.int64)
        bad_layer = self.faults.popleft() if self.faults else self.num_layers

        def copy_layer(layer: int) -> CopyEvent:
            if layer >= bad_layer:
                raise InjectedCopyError(f"layer {layer} did not arrive")
            self._inner.copy_layer(layer, block_ids, offsets)
            return FINISHED

        return [_LateCopy(partial(copy_layer, layer), 1, fails=False) for layer in range(self.num_layers)]

    def storer(self) -> EagerLayerStorer:
        """What stores the same layers."""
        return EagerLayerStorer(self._inner)

    def close(self) -> None:
        self._inner.close()


class EagerLayerStorer:
    """A layer storer that copies a layer at the very moment it is told of it: what the engine writes later is not in the arena.

    ``faults`` are layers at which a store breaks.
    """

    def __init__(self, inner: ThreadedLayerLoader) -> None:
        self.num_layers = inner.num_layers
        self.faults: deque[int] = deque()
        """for each of the next stores the layer that fails; ``num_layers`` or more: none"""
        self.num_stores = 0
        self.inner = inner

    def gather_layers(self, copies: Sequence[BlockCopy]) -> _EagerLayerStore:
        self.num_stores += 1
        return _EagerLayerStore(self, copies, self.faults.popleft() if self.faults else self.num_layers)


class _EagerLayerStore:
    def __init__(self, storer: EagerLayerStorer, copies: Sequence[BlockCopy], bad_layer: int) -> None:
        self._inner = storer.inner
        self._block_ids = array("q", [copy.block_id for copy in copies])
        self._offsets = np.array([copy.arena_offset for copy in copies], np.int64)
        self._bad_layer = bad_layer
        self._open_layers = set(range(storer.num_layers))

    def copy_layer(self, layer: int) -> None:
        if layer == self._bad_layer:
            raise InjectedCopyError(f"layer {layer} could not be stored")
        self._open_layers.remove(layer)
        self._inner.copy_layer(layer, self._block_ids, self._offsets, to_arena=True)

    def end(self) -> CopyEvent:
        assert not self._open_layers, "layers were forgotten"
        return FINISHED
