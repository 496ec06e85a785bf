"""Which I/O engine is used where."""

from __future__ import annotations

import logging
from typing import Literal

from kvtier.io.ring_engine import RingEngine
from kvtier.io.thread_engine import ThreadEngine
from kvtier.io.transfers import IoEngine

logger = logging.getLogger(__name__)

EngineKind = Literal["auto", "io_uring", "threads"]
"""``auto``: io_uring where the system has it and allows it, else threads; ``io_uring``: refusal is an error"""


def open_engine(kind: EngineKind, queue_depth: int, max_bytes: int, *, memory: tuple[int, int] | None = None) -> IoEngine:
    """The engine to use. ``memory``: address and length of the memory that most buffers lie in.

    Raises OSError where ``kind="io_uring"`` cannot be had, or the threads instead of it; ValueError for a bound below 1.
    """
    if kind == "threads":
        return ThreadEngine(queue_depth, max_bytes)
    try:
        return RingEngine(queue_depth, max_bytes, memory=memory)
    except OSError as error:  # ENOSYS: an old kernel; EPERM: a container's filter or the administrator; ENOMEM: no memory to lock
        if kind == "io_uring":
            raise
        logger.info("no io_uring here (%s): %d threads read and write", error, queue_depth)
        return ThreadEngine(queue_depth, max_bytes)
