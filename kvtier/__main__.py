"""``python -m kvtier``: the command line, where the ``kvtier`` script is not on the path."""

from __future__ import annotations

import sys

from kvtier.cli import main

if __name__ == "__main__":
    sys.exit(main())
