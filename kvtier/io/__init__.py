"""Aligned files, worker threads and I/O engines: the tools every tier with a disk below it needs. Knows nothing of blocks."""

from __future__ import annotations

from kvtier.io.aligned_file import PAGE_BYTES, AlignedFile, DirectMode, Scratch, address_of, is_page_aligned, preallocate, round_up_to_page
from kvtier.io.engines import EngineKind, open_engine
from kvtier.io.transfers import Completion, IoEngine, Transfer
from kvtier.io.workers import Task, WorkerPool, start_thread

__all__ = [
    "PAGE_BYTES",
    "AlignedFile",
    "Completion",
    "DirectMode",
    "EngineKind",
    "IoEngine",
    "Scratch",
    "Task",
    "Transfer",
    "WorkerPool",
    "address_of",
    "is_page_aligned",
    "open_engine",
    "preallocate",
    "round_up_to_page",
    "start_thread",
]
