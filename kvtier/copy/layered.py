"""Loads that arrive layer by layer, so that the forward pass need not wait for the last layer before it starts with the first."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence

import numpy as np

from kvtier import _native
from kvtier.copy.base import BlockCopy
from kvtier.copy.cpu import packed_segments
from kvtier.io import WorkerPool
from kvtier.layout import KVLayout


class ThreadedLayerLoader:
    """A :class:`~kvtier.copy.base.LayerLoader` for memory that the CPU can address: one thread copies while the engine computes.

    The caller keeps alive, until ``close``, what ``layout`` and ``arena_address`` point to.

    Args:
        layout: all segments of an engine block
        layers: the segments of each layer, in the order of the forward pass; together all segments, each once, ascending

    Raises:
        ValueError: the layers are not a division of the segments.
    """

    def __init__(self, layout: KVLayout, layers: Sequence[range], *, arena_address: int, arena_bytes: int) -> None:
        if [index for layer in layers for index in layer] != list(range(len(layout.segments))):
            raise ValueError(f"layers {list(layers)} do not divide {len(layout.segments)} segments")
        sizes = [segment.num_bytes for segment in layout.segments]
        self.num_layers = len(layers)
        self._paged = [packed_segments(KVLayout(layout.segments[layer.start : layer.stop], layout.num_blocks)) for layer in layers]
        self._offsets = [sum(sizes[: layer.start]) for layer in layers]
        self._block_bytes = layout.block_bytes
        self._arena_address = arena_address
        self._arena_bytes = arena_bytes
        self._pool = WorkerPool(1, "kvtier-layers")

    def scatter_layers(self, copies: Sequence[BlockCopy]) -> list[LayerCopy]:
        """Arena -> engine, layer after layer; one event a layer. See :class:`~kvtier.copy.base.LayerLoader`."""
        events = [LayerCopy() for _ in range(self.num_layers)]
        self._pool.submit(_Load(self, copies, events))
        return events

    def close(self) -> None:
        """Waits for running copies. Idempotent."""
        self._pool.close()

    def copy_layer(self, layer: int, block_ids: array[int], offsets: np.ndarray, *, to_arena: bool = False) -> None:
        """Copies one layer of some blocks, on the caller's thread."""
        place = offsets + self._offsets[layer]
        _native.copy_blocks(self._paged[layer], self._arena_address, self._arena_bytes, block_ids, place, to_arena)


class LayerCopy:
    """The event of one layer of a load on another thread."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether the layer is in the engine's blocks; never waits. Raises what the copy raised."""
        if not self._is_over.is_set():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Waits for the layer. Raises what the copy raised."""
        self._is_over.wait()
        if self._error is not None:
            raise self._error

    def released(self) -> bool:
        """As ``done``: a load reads nothing of the engine's."""
        return self.done()

    def order_compute(self) -> None:
        """Waits: a CPU has no stream that could do it."""
        self.wait()

    def end(self, error: BaseException | None = None) -> None:
        """Reports the copy as over, on the copying thread."""
        self._error = error
        self._is_over.set()

    @property
    def is_over(self) -> bool:
        """Whether ``end`` was called."""
        return self._is_over.is_set()


class _Load:
    """All layers of one load: a task of the thread."""

    def __init__(self, loader: ThreadedLayerLoader, copies: Sequence[BlockCopy], events: Sequence[LayerCopy]) -> None:
        self._loader = loader
        self._copies = copies
        self._events = events

    def run(self) -> None:
        block_ids = array("q", [copy.block_id for copy in self._copies])
        offsets = np.fromiter((copy.arena_offset for copy in self._copies), np.int64, len(self._copies))
        for layer, event in enumerate(self._events):
            self._loader.copy_layer(layer, block_ids, offsets)
            event.end()

    def fail(self, error: BaseException) -> None:
        for event in self._events:
            if not event.is_over:
                event.end(error)
