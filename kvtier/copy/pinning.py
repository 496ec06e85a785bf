"""Host memory that a CUDA device copies straight from and to: registered, given back, and what a refusal leaves behind. By torch."""

from __future__ import annotations

import contextlib
import logging

import torch

from kvtier.memory.arena import Arena

_LOG = logging.getLogger(__name__)
PREFAULT_TIMEOUT_S = 600.0
REGISTER_MAPPED = 2
"""a flag of CUDA: kernels may use the addresses"""


def pin_arena(arena: Arena, device: int) -> int:
    """Registers host memory with CUDA, for direct and asynchronous copies. Returns how much; 0 (slower, but right) where that fails.

    A kernel must not touch host memory behind that. What was registered must be given back by :func:`unpin` before it is unmapped.
    """
    arena.wait_prefaulted(PREFAULT_TIMEOUT_S)
    num_bytes = arena.ready_bytes
    error = torch.cuda.cudart().cudaHostRegister(arena.address, num_bytes, REGISTER_MAPPED)
    if int(error) != 0:
        _LOG.warning("kvtier: cudaHostRegister of %d bytes failed (%s); copies go through pageable memory", num_bytes, error)
        forget_error(device)
        return 0
    return num_bytes


def forget_error(device: int) -> None:
    """CUDA keeps the error of a call that was refused, and torch would raise it at the engine's next kernel: it is raised here instead."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=f"cuda:{device}")  # a launch, after which torch looks


def unpin(address: int, device: int) -> bool:
    """Gives back what :func:`pin_arena` registered from ``address`` on; no copy may be under way. False, after a warning: CUDA refused."""
    error = torch.cuda.cudart().cudaHostUnregister(address)
    if int(error) == 0:
        return True
    _LOG.warning("kvtier: cudaHostUnregister failed (%s)", error)
    forget_error(device)
    return False
