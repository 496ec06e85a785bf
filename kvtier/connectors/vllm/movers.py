"""What moves a worker's blocks: chosen by where the engine's KV memory lies and by what is installed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from kvtier.copy.base import BlockCopier, LayerLoader
from kvtier.copy.cpu import NativeCopier
from kvtier.copy.cuda_copier import ArenaPlace
from kvtier.copy.device import Device, cuda_copier, way_of
from kvtier.copy.layered import ThreadedLayerLoader
from kvtier.copy.pool import PoolCopier
from kvtier.copy.torch_copier import TorchCopier
from kvtier.layout import KVLayout
from kvtier.memory.arena import Arena

_LOG = logging.getLogger(__name__)
PREFAULT_TIMEOUT_S = 600.0
REGISTER_MAPPED = 2
"""a flag of CUDA: kernels may use the addresses"""

Movers = tuple[BlockCopier, LayerLoader | None]


def movers_of(
    arena: Arena,
    layout: KVLayout,
    views: Sequence[torch.Tensor],
    *,
    layers: Sequence[range] | None,
    pool_bytes: int,
    gpu_copy: str = "auto",
) -> Movers:
    """The copier of a worker and, where ``layers`` are given and the device can, what loads layer by layer.

    Args:
        layers: the segments of each layer; None: loads by layer are not wanted
        pool_bytes: what the pool in front of host memory takes on the device; 0: no pool
        gpu_copy: how copies to and from a GPU go, as the setting of this name says
    """
    copier, loader = _on_cpu(arena, layout, layers) if views[0].device.type == "cpu" else _on_cuda(arena, layout, views, layers, gpu_copy)
    return (PoolCopier(copier, views, arena.buffer, pool_bytes) if pool_bytes else copier), loader


def _on_cpu(arena: Arena, layout: KVLayout, layers: Sequence[range] | None) -> Movers:
    place = {"arena_address": arena.address, "arena_bytes": arena.capacity_bytes}
    return NativeCopier(layout, **place), None if layers is None else ThreadedLayerLoader(layout, layers, **place)


def _on_cuda(arena: Arena, layout: KVLayout, views: Sequence[torch.Tensor], layers: Sequence[range] | None, gpu_copy: str) -> Movers:
    pinned_bytes = pin_arena(arena)
    if not pinned_bytes:
        return TorchCopier(views, arena.buffer), None
    number = views[0].device.index or 0
    device = Device(number, lambda: int(torch.cuda.current_stream(number).cuda_stream))
    copier = cuda_copier(layout, device, ArenaPlace(arena.address, pinned_bytes), layers=layers, forced=way_of(gpu_copy))
    if copier is None:
        return TorchCopier(views, arena.buffer), None
    return copier, None if layers is None else copier


def pin_arena(arena: Arena) -> int:
    """Registers host memory with CUDA, for direct and asynchronous copies. Returns how much; 0 (slower, but right) where that fails.

    A kernel must not touch host memory behind that.
    """
    arena.wait_prefaulted(PREFAULT_TIMEOUT_S)
    num_bytes = arena.ready_bytes
    error = torch.cuda.cudart().cudaHostRegister(arena.address, num_bytes, REGISTER_MAPPED)
    if int(error) != 0:
        _LOG.warning("kvtier: cudaHostRegister of %d bytes failed (%s); copies go through pageable memory", num_bytes, error)
        return 0
    return num_bytes
