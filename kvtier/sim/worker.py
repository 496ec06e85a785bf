"""``python -m kvtier.sim.worker DESCRIPTOR``: replays what :func:`kvtier.sim.processes.in_processes` sends."""

from __future__ import annotations

import sys
from typing import Any

from kvtier.sim.processes import Progress, serve
from kvtier.sim.replay import PROGRESS_EVERY
from kvtier.sim.runs import Run, Task, replay


def _replay(task: Task, run: Run, progress: Progress) -> dict[str, Any]:
    """As :func:`kvtier.sim.runs.replay`; tells of its progress in larger steps."""
    waiting = 0

    def tell(more: int) -> None:
        nonlocal waiting
        waiting += more
        if waiting >= 4 * PROGRESS_EVERY:
            progress(waiting)
            waiting = 0

    record = replay(task, run, tell)
    progress(waiting)
    return record


if __name__ == "__main__":
    serve(int(sys.argv[1]), _replay)
