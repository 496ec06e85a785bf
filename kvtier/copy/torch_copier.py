"""Copies blocks between KV tensors and the arena by torch alone: for CUDA devices where there are no kernels, and for the CPU.

A batch goes through a staging buffer on the tensors' device, where its blocks lie as they do in the arena. So it takes one
operation per tensor and one per block, not one for each pair of them::

    tensor 0  tensor 1  ...      index_select / index_copy, on the device
        \\        |        /
      staging: block, block, ...
          |       |               one contiguous copy per block, across the bus
    arena:  ...block......block...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from kvtier.copy.base import BlockCopy
from kvtier.copy.cpu import FINISHED, FinishedCopy

STAGING_BYTES = 32 << 20


class CudaCopyEvent:
    """The end of a copy on a CUDA stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def done(self) -> bool:
        """Whether the copy has finished; never waits."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Waits until the copy has finished."""
        self._event.synchronize()

    def released(self) -> bool:
        """As ``done``."""
        return self.done()

    def order_compute(self) -> None:
        """Makes the current stream wait, not the caller."""
        torch.cuda.current_stream().wait_event(self._event)


class TorchCopier:
    """A :class:`~kvtier.copy.base.BlockCopier` for KV tensors on any one device. On CUDA it is asynchronous, with one stream per direction.

    The arena should be registered with CUDA: copies from and to pageable memory are right, but keep the caller waiting.
    The block ids of one scatter must differ from each other, as must the offsets of one gather.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], arena: memoryview | torch.Tensor, *, staging_bytes: int = STAGING_BYTES) -> None:
        """Binds to the engine's tensors and to the arena.

        Args:
            tensors: one int8 view ``[num_blocks, bytes]`` per segment, in the layout's order
            arena: writable, all of the arena's payload; or an int8 tensor in its place
            staging_bytes: how much memory each direction takes on the device; at least one block

        Raises:
            ValueError: the tensors are not of this form, or not on one device with equally many blocks.
        """
        _check_tensors(tensors)
        self._tensors = list(tensors)
        self._num_blocks = tensors[0].shape[0]
        self._segment_bytes = [tensor.shape[1] for tensor in tensors]
        self._block_bytes = sum(self._segment_bytes)
        self._arena = arena if isinstance(arena, torch.Tensor) else torch.frombuffer(arena, dtype=torch.int8)
        self._device = tensors[0].device
        self.is_async = self._device.type == "cuda"
        self._num_staged = max(1, staging_bytes // self._block_bytes)
        self._to_arena = _Lane(self._device)
        self._from_arena = _Lane(self._device)

    def gather(self, copies: Sequence[BlockCopy]) -> CudaCopyEvent | FinishedCopy:
        """Engine -> arena. See :class:`~kvtier.copy.base.BlockCopier`."""
        self._check_bounds(copies)
        with self._to_arena.running():
            for batch, ids, staging in self._batches(copies, self._to_arena):
                pieces = staging.split(self._segment_bytes, dim=1)
                for tensor, piece in zip(self._tensors, pieces, strict=True):
                    piece.copy_(tensor.index_select(0, ids))
                for copy, block in zip(batch, staging, strict=True):
                    self._in_arena(copy).copy_(block, non_blocking=True)
            return self._to_arena.event()

    def scatter(self, copies: Sequence[BlockCopy]) -> CudaCopyEvent | FinishedCopy:
        """Arena -> engine. See :class:`~kvtier.copy.base.BlockCopier`."""
        self._check_bounds(copies)
        with self._from_arena.running():
            for batch, ids, staging in self._batches(copies, self._from_arena):
                for copy, block in zip(batch, staging, strict=True):
                    block.copy_(self._in_arena(copy), non_blocking=True)
                pieces = staging.split(self._segment_bytes, dim=1)
                for tensor, piece in zip(self._tensors, pieces, strict=True):
                    tensor.index_copy_(0, ids, piece)
            return self._from_arena.event()

    def _check_bounds(self, copies: Sequence[BlockCopy]) -> None:
        last_offset = self._arena.numel() - self._block_bytes
        for copy in copies:
            if not 0 <= copy.block_id < self._num_blocks:
                raise IndexError(f"block id {copy.block_id} is outside [0, {self._num_blocks})")
            if not 0 <= copy.arena_offset <= last_offset:
                raise IndexError(f"a block of {self._block_bytes} bytes at arena offset {copy.arena_offset} is outside the arena")

    def _batches(self, copies: Sequence[BlockCopy], lane: _Lane) -> Iterator[tuple[Sequence[BlockCopy], torch.Tensor, torch.Tensor]]:
        """What fits into the staging buffer at a time: the copies, their block ids on the device, their rows of the buffer."""
        staging = lane.staging(self._num_staged, self._block_bytes)
        for start in range(0, len(copies), self._num_staged):
            batch = copies[start : start + self._num_staged]
            # From pinned memory: a copy from pageable memory may wait for the whole stream.
            ids = torch.tensor([copy.block_id for copy in batch], dtype=torch.int64, pin_memory=self.is_async)
            yield batch, ids.to(self._device, non_blocking=True), staging[: len(batch)]

    def _in_arena(self, copy: BlockCopy) -> torch.Tensor:
        return self._arena[copy.arena_offset : copy.arena_offset + self._block_bytes]


class _Lane:
    """One direction: its stream, if the device has streams, and its staging buffer, which only work on that stream touches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staging: torch.Tensor | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What is submitted inside runs on the lane's stream, after all that was submitted to the caller's stream before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def event(self) -> CudaCopyEvent | FinishedCopy:
        """The end of what was submitted so far."""
        if self._stream is None:
            return FINISHED
        event = torch.cuda.Event()
        event.record(self._stream)
        return CudaCopyEvent(event)

    def staging(self, num_blocks: int, block_bytes: int) -> torch.Tensor:
        """Room for ``num_blocks`` blocks, kept for the next call."""
        if self._staging is None:
            self._staging = torch.empty((num_blocks, block_bytes), dtype=torch.int8, device=self._device)
        return self._staging


def _check_tensors(tensors: Sequence[torch.Tensor]) -> None:
    if not tensors:
        raise ValueError("no KV tensors")
    first = tensors[0]
    for index, tensor in enumerate(tensors):
        is_view_of_bytes = tensor.dtype == torch.int8 and tensor.dim() == 2 and tensor.stride(1) == 1
        if not is_view_of_bytes or tensor.numel() == 0 or tensor.device != first.device or len(tensor) != len(first):
            raise ValueError(
                f"KV tensor {index} must be int8 [{len(first)}, bytes] on {first.device} with contiguous rows, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
