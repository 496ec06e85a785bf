"""What moves a worker's blocks: chosen by where the engine's KV memory lies and by what is installed."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kvtier.copy.base import Movers
from kvtier.copy.cpu import NativeCopier
from kvtier.copy.cuda_copier import ArenaPlace, CudaCopier
from kvtier.copy.device import Device, cuda_copier, way_of
from kvtier.copy.layered import ThreadedLayerLoader
from kvtier.copy.pinning import pin_arena, unpin
from kvtier.copy.pool import PoolCopier
from kvtier.copy.torch_copier import TorchCopier
from kvtier.layout import KVLayout
from kvtier.memory.arena import Arena

if TYPE_CHECKING:
    from kvtier.config import ConnectorConfig

_LOG = logging.getLogger(__name__)


def movers_of(
    arena: Arena,
    layout: KVLayout,
    views: Sequence[torch.Tensor],
    *,
    layers: Sequence[range] | None,
    pool_bytes: int,
    settings: ConnectorConfig,
) -> Movers:
    """The copier of a worker and, where ``layers`` are given and the device can, what loads and stores layer by layer.

    A CPU has no second stream, so there a store by layer would only interrupt the forward pass: it stores whole blocks.

    Args:
        layers: the segments of each layer; None: copies by layer are not wanted
        pool_bytes: what the pool in front of host memory takes on the device; 0: no pool
        settings: ``copy_threads`` for a CPU, ``gpu_copy`` for a GPU
    """
    if views[0].device.type == "cpu":
        movers = _on_cpu(arena, layout, layers, settings.copy_threads)
    else:
        movers = _on_cuda(arena, layout, views, layers, settings.gpu_copy)
    if not pool_bytes:
        return movers
    assert movers.copier is not None
    try:
        pool = PoolCopier.allocate(movers.copier, views, arena.buffer, pool_bytes)
    except BaseException:
        movers.release()
        raise
    return replace(movers, copier=pool, release=functools.partial(_release_pool, pool, views[0].device, movers.release))


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """What a thread does inside is done on this device: threads of their own start on the first one, and so would their events."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _on_cpu(arena: Arena, layout: KVLayout, layers: Sequence[range] | None, num_threads: int) -> Movers:
    place = {"arena_address": arena.address, "arena_bytes": arena.capacity_bytes}
    copier = NativeCopier(layout, **place, num_threads=num_threads)
    return Movers(copier, None if layers is None else ThreadedLayerLoader(layout, layers, **place))


def _on_cuda(arena: Arena, layout: KVLayout, views: Sequence[torch.Tensor], layers: Sequence[range] | None, gpu_copy: str) -> Movers:
    number = views[0].device.index or 0
    pinned_bytes = pin_arena(arena, number)
    if not pinned_bytes:
        return Movers(TorchCopier(views, arena.buffer))
    device = Device(number, lambda: int(torch.cuda.current_stream(number).cuda_stream))
    copier = cuda_copier(layout, device, ArenaPlace(arena.address, pinned_bytes), layers=layers, forced=way_of(gpu_copy))
    release = functools.partial(_release, copier, arena.address, number)
    if copier is None:
        return Movers(TorchCopier(views, arena.buffer), release=release)
    by_layer = None if layers is None else copier
    return Movers(copier, by_layer, by_layer, copier, release)


def _release_pool(pool: PoolCopier, device: torch.device, release_rest: Callable[[], None]) -> None:
    try:
        with on_device(device):
            pool.close()
    except RuntimeError as error:
        _LOG.warning("kvtier: the pool's copies did not end well: %s", error)
    release_rest()


def _release(copier: CudaCopier | None, address: int, device: int) -> None:
    # Memory that is unmapped while CUDA knows it stays known: whatever is mapped there next would be copied from the old pages.
    try:
        with torch.cuda.device(device):
            if copier is not None:
                copier.close()
            unpin(address, device)
    except RuntimeError as error:
        _LOG.warning("kvtier: the device did not let go of host memory: %s", error)
