"""Options of benchmarks, checked before anything is measured: an error after minutes of measuring is a run lost."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from kvtier.sim.arguments import file_to_write

MOST_ROUNDS = 1_000_000
MOST_MIB = 1 << 20
MOST_BLOCKS = 100_000_000
MOST_THREADS = 256
MOST_TOKENS = 4000
"""of a prompt; the engines take 4,096 with the answer"""


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to {most}")
        return number

    return read


def writable_directory(text: str) -> Path:
    """The type of an option that names a directory to make files in."""
    path = Path(text)
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text} is not a directory that this process may write to")
    return path


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``, which every benchmark has."""
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures to FILE")


def add_rounds(parser: argparse.ArgumentParser, default: int, what: str = "timed rounds per figure") -> None:
    """``--rounds``, which nearly every benchmark has."""
    parser.add_argument("--rounds", type=whole(1, MOST_ROUNDS), default=default, help=f"{what} (default: {default})")
