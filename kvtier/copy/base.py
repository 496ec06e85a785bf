"""The contract of a block copier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtier.copy.cuda_runs import Addresses, Ints


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """One engine block and the byte offset in the arena where its segments lie one after the other."""

    block_id: int
    arena_offset: int
    pool_offset: int = -1
    """where the block passes through the device pool; -1: past it"""
    in_pool: bool = False
    """loads only: the pool has the bytes already, the arena is not read"""


class CopyEvent(Protocol):
    """Completion of a copy that may still run."""

    def done(self) -> bool:
        """Whether the copy has finished; never waits. Raises what the copy raised."""

    def wait(self) -> None:
        """Waits until the copy has finished. Raises what the copy raised."""

    def released(self) -> bool:
        """Stores: whether the engine's blocks are no longer read; never waits. True at the latest when ``done``."""

    def order_compute(self) -> None:
        """Orders what the engine submits to its compute stream from now on after the copy; waits where there is no stream."""


class BlockCopier(Protocol):
    """Moves whole engine blocks between an engine's paged KV tensors and the arena.

    Bound to one layout and one arena at construction. Not thread-safe. Offsets and block ids are checked against
    the bounds before any byte moves (IndexError).
    """

    is_async: bool
    """False: a copy has finished when ``gather`` or ``scatter`` returns"""

    def gather(self, copies: Sequence[BlockCopy]) -> CopyEvent:
        """engine -> arena. Ordered after everything the engine has submitted to its compute stream so far."""

    def scatter(self, copies: Sequence[BlockCopy]) -> CopyEvent:
        """arena -> engine. The engine's later work on the blocks must be ordered after the event."""


class LayerLoader(Protocol):
    """Loads blocks layer by layer. Bound like a :class:`BlockCopier`."""

    num_layers: int

    def scatter_layers(self, copies: Sequence[BlockCopy]) -> Sequence[CopyEvent]:
        """arena -> engine, in the order of the forward pass: one event a layer, the last of which ends last.

        The events of the layers behind a failed one raise too.
        """

    def close(self) -> None:
        """Waits for running copies and ends what the loader keeps for them. Idempotent."""


class LayerStore(Protocol):
    """A store whose layers are copied as the engine computes them. Where a call raises, nothing of the store runs any more."""

    def copy_layer(self, layer: int) -> None:
        """Starts to copy one layer, after everything the engine has submitted to its compute stream so far. Once for each layer."""

    def end(self) -> CopyEvent:
        """The end of all layers, after the last ``copy_layer``."""


class LayerStorer(Protocol):
    """Stores blocks layer by layer. Bound like a :class:`BlockCopier`."""

    num_layers: int

    def gather_layers(self, copies: Sequence[BlockCopy]) -> LayerStore:
        """engine -> arena. Nothing is copied yet. Offsets and block ids are checked (IndexError)."""


class PieceReader(Protocol):
    """Reads any part of the arena into memory of the device. Bound like a :class:`BlockCopier`."""

    def read_pieces(self, to: Addresses, offsets: Ints, num_bytes: int) -> CopyEvent:
        """arena -> device: ``num_bytes`` from each of ``offsets`` to each of the addresses ``to``.

        Ordered after everything the engine has submitted to its compute stream so far. Offsets are checked (IndexError); that there
        is so much memory at the addresses, until the event, is the caller's part.
        """


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Movers:
    """What moves a worker's blocks: whole, and in the other ways where that is wanted and possible."""

    copier: BlockCopier | None = None
    """None: nothing can be moved"""
    loader: LayerLoader | None = None
    storer: LayerStorer | None = None
    pieces: PieceReader | None = None
    """None: the arena is read by the CPU"""
    release: Callable[[], None] = _nothing
    """Lets go of the device's memory and of the arena, which may be unmapped then. After the last copy has ended; never raises."""
