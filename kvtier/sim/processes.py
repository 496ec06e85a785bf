"""Work in processes of their own, over one socket each.

They are in sessions of their own, so that Ctrl-C reaches only who started them, and end when their socket does, however that comes. In
between there are no threads and no locks, which an interrupt at the wrong moment could leave behind (those of ``concurrent.futures`` were).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

Answer = tuple[str, Any]
"""``("progress", how much more is done)``, ``("result", it)`` or ``("error", an exception)``"""
Progress = Callable[[int], None]


def in_processes(module: str, shared: object, items: Sequence[object], jobs: int, progress: Progress) -> Iterator[Any]:
    """What a module's processes make of items, in their order.

    The module is run with the number of a descriptor as its argument, and calls :func:`serve` with it. At most ``jobs`` items are worked
    on at the same time. However this ends, so do the processes. Not thread-safe.

    Raises:
        ChildProcessError: a process ended by itself.
        Exception: whatever the work raised.
    """
    todo = deque(enumerate(items))
    results: dict[int, Any] = {}
    workers: list[_Worker] = []
    try:
        workers.extend(_Worker(module) for _ in range(min(jobs, len(items))))
        for worker in workers:
            worker.send(shared)
            worker.take(*todo.popleft())
        for number in range(len(items)):
            while number not in results:
                ready = wait([worker.connection for worker in workers])
                for worker in [worker for worker in workers if worker.connection in ready]:
                    kind, value = worker.receive()
                    if kind == "progress":
                        progress(value)
                        continue
                    if kind == "error":
                        raise value
                    results[worker.number] = value
                    if todo:
                        worker.take(*todo.popleft())
            yield results.pop(number)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    def __init__(self, module: str) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
        self.number = -1
        """of the item it has"""

    def take(self, number: int, item: object) -> None:
        self.number = number
        self.send(item)

    def send(self, message: object) -> None:
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended() from None

    def receive(self) -> Answer:
        try:
            answer: Answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended() from None
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.connection.close()

    def _ended(self) -> ChildProcessError:
        status = self._process.wait()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return ChildProcessError(f"a process at work, {self._process.pid}, {how} before its time")


def serve(descriptor: int, work: Callable[[Any, Any, Progress], object]) -> None:
    """In the process: answers each item with what ``work(shared, item, progress)`` makes of it, until the other end is closed."""
    with Connection(descriptor) as connection:
        try:
            shared = connection.recv()
            while True:
                item = connection.recv()
                connection.send(_answer(work, shared, item, lambda more: connection.send(("progress", more))))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # nobody wants the rest


def _answer(work: Callable[[Any, Any, Progress], object], shared: object, item: object, progress: Progress) -> Answer:
    try:
        return "result", work(shared, item, progress)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:  # noqa: BLE001 - process boundary: who asked for the work gets what it raised
        return "error", error
