"""Room on disk for what a benchmark writes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_directory(parent: Path | None = None) -> Iterator[Path]:
    """A directory of its own in ``parent``, or where temporary files go; gone with all that is in it when the block is left."""
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-", dir=parent, ignore_cleanup_errors=True) as directory:
        yield Path(directory)
