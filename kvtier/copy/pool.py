"""Copies that pass through a pool of slots on the engine's device.

    engine's blocks --gather--> pool slot --one run--> arena          a store; the engine's blocks are free after the first arrow
    arena --one run--> pool slot --scatter--> engine's blocks         a load of what the pool lacks
                       pool slot --scatter--> engine's blocks         a load of what it has

In the pool a block lies as in the arena, so what crosses the bus are long runs. The first arrow is a kernel where there are
kernels, torch where not; on a CPU the same steps run on CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from kvtier.copy.base import BlockCopier, BlockCopy, CopyEvent
from kvtier.copy.cpu import FINISHED
from kvtier.copy.cuda_copier import ArenaPlace, CudaCopier
from kvtier.copy.torch_copier import CudaCopyEvent, TorchCopier


class PoolCopier:
    """A :class:`~kvtier.copy.base.BlockCopier` that takes copies with a ``pool_offset`` through the pool, the others past it.

    :meth:`allocate` makes one with its pool.

    Args:
        direct: copies between the engine and the arena; stays the caller's
        within: copies between the engine and ``pool``, which is in the arena's place for it; closed with this one
        arena: writable, all of the arena's payload; registered with CUDA where the pool is there
        pool: int8, on the device of the engine's blocks
        block_bytes: of one engine block
    """

    def __init__(self, direct: BlockCopier, within: BlockCopier, arena: memoryview, pool: torch.Tensor, *, block_bytes: int) -> None:
        self.is_async = direct.is_async
        self._direct = direct
        self._within = within
        self._device = pool.device
        self._block_bytes = block_bytes
        self._pool = pool
        self._arena = torch.frombuffer(arena, dtype=torch.int8)
        self._out = _Stream(self._device)
        self._in = _Stream(self._device)

    @classmethod
    def allocate(cls, direct: BlockCopier, tensors: Sequence[torch.Tensor], arena: memoryview, pool_bytes: int) -> PoolCopier:
        """With a pool of this size on the tensors' device, filled and emptied by kernels where ``direct`` has kernels.

        Args:
            tensors: as of :class:`~kvtier.copy.torch_copier.TorchCopier`

        Raises:
            ValueError: the tensors are not of the right form.
            torch.OutOfMemoryError: the device has no room for the pool.
            MemoryError: nor for what the kernels need beside it.
        """
        pool = torch.empty(pool_bytes, dtype=torch.int8, device=tensors[0].device)
        if isinstance(direct, CudaCopier):
            within: BlockCopier = direct.to_device(ArenaPlace(pool.data_ptr(), pool_bytes, is_on_device=True))
        else:
            within = TorchCopier(tensors, pool)
        return cls(direct, within, arena, pool, block_bytes=sum(tensor.shape[1] for tensor in tensors))

    def gather(self, copies: Sequence[BlockCopy]) -> CopyEvent:
        """Engine -> arena. See :class:`~kvtier.copy.base.BlockCopier`."""
        pooled, past = _split(copies)
        events = [self._direct.gather(past)] if past else []
        if not pooled:
            return _all_of(events, events)
        gathered = self._within.gather(_in_pool(pooled))
        with self._out.after(gathered):
            for pool, arena in self._runs(pooled):
                arena.copy_(pool, non_blocking=True)
        return _all_of([*events, self._out.event()], [*events, gathered])

    def scatter(self, copies: Sequence[BlockCopy]) -> CopyEvent:
        """Arena or pool -> engine. See :class:`~kvtier.copy.base.BlockCopier`."""
        pooled, past = _split(copies)
        events = [self._direct.scatter(past)] if past else []
        if not pooled:
            return _all_of(events, events)
        absent = [copy for copy in pooled if not copy.in_pool]
        with self._in.after(None):
            for pool, arena in self._runs(absent):
                pool.copy_(arena, non_blocking=True)
            # ordered behind these runs, and not the engine: inside, this stream is the one that the scatter is submitted after
            events.append(self._within.scatter(_in_pool(pooled)))
        return _all_of(events, events)

    def close(self) -> None:
        """Waits for running copies, and gives back what the copies between the engine and the pool took of the device. Idempotent.

        ``direct`` stays open, and the pool lives as long as this object.
        """
        for stream in (self._out, self._in):
            stream.event().wait()
        if isinstance(self._within, CudaCopier):
            self._within.close()

    def _runs(self, copies: Sequence[BlockCopy]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pieces of the pool and of the arena that belong together; blocks that are neighbours in both are one piece."""
        size = self._block_bytes
        start = 0
        for end in range(1, len(copies) + 1):
            if end < len(copies) and _is_next(copies[end - 1], copies[end], size):
                continue
            first, num_bytes = copies[start], (end - start) * size
            pool = self._pool[first.pool_offset : first.pool_offset + num_bytes]
            arena = self._arena[first.arena_offset : first.arena_offset + num_bytes]
            if len(pool) < num_bytes or len(arena) < num_bytes or first.arena_offset < 0:
                raise IndexError(f"{num_bytes} bytes at {first.pool_offset} of the pool or {first.arena_offset} of the arena are outside")
            yield pool, arena
            start = end


class _AllOf:
    """The end of several copies; ``released``: the engine's blocks are no longer read."""

    def __init__(self, events: Sequence[CopyEvent], releasing: Sequence[CopyEvent]) -> None:
        self._events = events
        self._releasing = releasing

    def done(self) -> bool:
        return all(event.done() for event in self._events)

    def wait(self) -> None:
        for event in self._events:
            event.wait()

    def order_compute(self) -> None:
        for event in self._events:
            event.order_compute()

    def released(self) -> bool:
        return all(event.released() for event in self._releasing)


class _Stream:
    """One direction across the bus; on a CPU nothing but the caller."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def after(self, event: CopyEvent | None) -> Iterator[None]:
        """What is submitted inside runs on this stream, after ``event`` and all that the caller's stream has."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if event is not None:
                event.order_compute()
            yield

    def event(self) -> CopyEvent:
        """The end of what was submitted so far."""
        if self._stream is None:
            return FINISHED
        event = torch.cuda.Event()
        event.record(self._stream)
        return CudaCopyEvent(event)


def _split(copies: Sequence[BlockCopy]) -> tuple[list[BlockCopy], list[BlockCopy]]:
    pooled = [copy for copy in copies if copy.pool_offset >= 0]
    return pooled, [copy for copy in copies if copy.pool_offset < 0]


def _in_pool(copies: Sequence[BlockCopy]) -> list[BlockCopy]:
    """The same copies with the pool in the arena's place."""
    return [BlockCopy(copy.block_id, copy.pool_offset) for copy in copies]


def _is_next(copy: BlockCopy, other: BlockCopy, size: int) -> bool:
    return other.pool_offset - copy.pool_offset == size == other.arena_offset - copy.arena_offset


def _all_of(events: Sequence[CopyEvent], releasing: Sequence[CopyEvent]) -> CopyEvent:
    return events[0] if len(events) == 1 and list(events) == list(releasing) else _AllOf(events, releasing)
