"""The disk tier. ``docs/reference/format.md`` specifies its files, ``docs/explanation/crash-story.md`` says why they are safe.

=================  ============================================================================
module             what it knows
=================  ============================================================================
``tier``           the :class:`~kvtier.tiers.base.Tier` itself: threads, locks, who calls whom
``ledger``         what was promised to whom, and what must wait for what (no I/O)
``places``         the index in RAM and the slots (no I/O)
``committer``      the thread that changes the index file
``runs``           tasks of the I/O threads
``record_io``      records to and from segment files, with verification
``segments``       the segment files
``index_file``     the LMDB file, the proof of a clean close, ``salvage`` in a child process
``recovery``       opening a directory
``scan``           the index rebuilt from the records
``check``          fsck
``format``         the bytes on disk
``geometry``       how the capacity is divided
``disk_health``    when to stop asking a disk that fails, or does not answer
``closing``        ending what may never end
``lock``           one process per directory
=================  ============================================================================
"""

from __future__ import annotations

from kvtier.tiers.disk.check import check_path
from kvtier.tiers.disk.recovery import Recovery
from kvtier.tiers.disk.tier import DiskTier

__all__ = ["DiskTier", "Recovery", "check_path"]
