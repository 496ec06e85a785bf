"""Prints the rows of an LMDB file that nobody vouches for. Run as a process of its own, by path; imports nothing of kvtier.

A damaged LMDB file can kill the process that maps it (SIGBUS, SIGSEGV, abort) or send it round in circles.  So the process
that serves an engine never maps one: this one does, and if it dies the index is rebuilt from the records.

Usage: python -I -S salvage.py DIRECTORY_OF_THE_LMDB_PACKAGE INDEX_FILE PLACE_BYTES ENTRY_BYTES
Standard output: the rows, then their number as 8 bytes little-endian.  Exit status 0 only if all were of the right size.
"""

from __future__ import annotations

import os
import resource
import sys


def main(package_directory: str, path: str, place_bytes: int, entry_bytes: int) -> int:
    """Writes the rows to standard output; returns the exit status."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its death is expected, nobody wants the corpse
    sys.path.insert(0, package_directory)
    import lmdb  # noqa: PLC0415 - not before its place is known: this process runs without site-packages

    environment = lmdb.open(path, subdir=False, readonly=True, lock=False, create=False, map_size=os.path.getsize(path))
    num_rows = 0
    with environment.begin() as transaction, os.fdopen(sys.stdout.fileno(), "wb", closefd=False) as output:
        for key, value in transaction.cursor():
            if len(key) != place_bytes or len(value) != entry_bytes:
                return 1
            output.write(key + value)
            num_rows += 1
        if num_rows != transaction.stat()["entries"]:
            return 1
        output.write(num_rows.to_bytes(8, "little"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
