"""Aligned files and worker threads: the tools every tier with a disk below it needs. Knows nothing of blocks."""

from __future__ import annotations

from kvtier.io.aligned_file import PAGE_BYTES, AlignedFile, DirectMode, Scratch, is_page_aligned, preallocate, round_up_to_page
from kvtier.io.workers import Task, WorkerPool

__all__ = ["PAGE_BYTES", "AlignedFile", "DirectMode", "Scratch", "Task", "WorkerPool", "is_page_aligned", "preallocate", "round_up_to_page"]
