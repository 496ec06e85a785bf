"""Calls that end by their deadlines, whatever they call."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvtier.errors import RemoteError
from kvtier.io import WorkerPool
from kvtier.testing.starts import nothing_left, refused_threads
from kvtier.tiers.redis import RedisAccess, RedisClient
from kvtier.tiers.remote import Deadline
from kvtier.tiers.remote.bounded_calls import BoundedCalls, CallsAbortedError


@pytest.fixture
def calls() -> Iterator[BoundedCalls]:
    """Two at a time."""
    calls = BoundedCalls(2, "kvtier-test-calls")
    yield calls
    calls.close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_results_and_errors_come_back(calls: BoundedCalls) -> None:
    """To whoever called."""
    assert [0, 1, 2] == [calls.call(lambda number=number: number, Deadline(5.0)) for number in range(3)]  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):
        calls.call(lambda: 1 // 0, Deadline(5.0))


def test_what_comes_too_late_is_disposed_of(calls: BoundedCalls) -> None:
    """Once, by the thread that made it; the caller had its time-out in time."""
    gate, disposed = threading.Event(), list[str]()

    def work() -> str:
        gate.wait(20)
        return "late"

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        calls.call(work, Deadline(0.1), dispose=disposed.append)
    assert time.monotonic() - began < 5
    assert [] == disposed
    gate.set()
    wait_until(lambda: disposed)
    assert ["late"] == disposed
    assert "in time" == calls.call(lambda: "in time", Deadline(5.0), dispose=disposed.append)
    assert ["late"] == disposed


def test_calls_behind_such_as_do_not_end_have_their_deadlines_too(calls: BoundedCalls) -> None:
    """There are no more threads than there may be; what waited for one and was given up is never begun."""
    gate, begun = threading.Event(), list[int]()

    def work(number: int) -> None:
        begun.append(number)
        gate.wait(20)

    before = threading.active_count()
    for number in range(5):
        with pytest.raises(TimeoutError):
            calls.call(lambda number=number: work(number), Deadline(0.05))  # type: ignore[misc]
    assert threading.active_count() <= before + 2
    gate.set()
    assert 7 == calls.call(lambda: 7, Deadline(5.0))
    assert [0, 1] == begun


def test_aborting_ends_the_waiting(calls: BoundedCalls) -> None:
    """Of calls under way and of those to come."""
    gate, errors = threading.Event(), list[BaseException]()

    def wait_for_it() -> None:
        try:
            calls.call(lambda: gate.wait(20), Deadline(20.0))
        except CallsAbortedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    wait_until(lambda: calls._calls)
    calls.abort()
    thread.join(5)
    assert 1 == len(errors)
    with pytest.raises(CallsAbortedError):
        calls.call(lambda: 1, Deadline(5.0))
    gate.set()


def test_where_no_thread_can_be_had() -> None:
    """An OSError, and nothing is left behind; the next call tries again."""
    with nothing_left():
        calls = BoundedCalls(2, "kvtier-test-calls")
        with refused_threads("kvtier-test-calls-1"), pytest.raises(OSError, match="can't start new thread"):
            calls.call(lambda: 1, Deadline(5.0))
        assert 1 == calls.call(lambda: 1, Deadline(5.0))
        calls.close()


class DribblingServer:
    """Answers a handshake byte by byte, never ending a line; ``flood``: with as many bytes as anybody reads."""

    def __init__(self, *, flood: bool = False) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._piece = bytes(1 << 20) if flood else b"-"
        self._pause_s = 0.0 if flood else 0.1
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        except OSError:
            return

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while True:
                connection.sendall(self._piece)
                time.sleep(self._pause_s)

    def close(self) -> None:
        """Ends all connections too: who asks a cluster reads on as long as something comes."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(params=[False, True], ids=["dribble", "flood"])
def server(request: pytest.FixtureRequest) -> Iterator[DribblingServer]:
    server = DribblingServer(flood=request.param)
    yield server
    server.close()


@pytest.mark.parametrize("is_cluster", [False, True])
def test_a_redis_whose_handshake_never_ends(server: DribblingServer, is_cluster: bool) -> None:
    """Each call ends by its deadline, however little or much comes; closing does not wait, and lets the server go."""
    url = f"redis://127.0.0.1:{server.port}/0"
    client = RedisClient(RedisAccess(url=url, cluster=is_cluster))
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(RemoteError, match=r"not done by the deadline") as caught:
            client.sizes(["name"], Deadline(0.3))
        assert time.monotonic() - began < 3
        assert "timeouts" == caught.value.event
    pool = client._endpoint._pool
    if pool is not None:
        wait_until(lambda: not pool._in_use_connections)
        assert all(connection._sock is None for connection in pool._available_connections)
    began = time.monotonic()
    client.abort()
    client.close()
    assert time.monotonic() - began < 3


def test_closing_waits_once_for_all_threads() -> None:
    """However many of them do not end."""
    gate = threading.Event()

    class Endless:
        def run(self) -> None:
            gate.wait(20)

        def fail(self, error: BaseException) -> None:
            raise AssertionError from error

    pool = WorkerPool(8, "kvtier-test-endless")
    for _ in range(8):
        pool.submit(Endless())
    began = time.monotonic()
    pool.close(timeout_s=0.2)
    assert 0.15 < time.monotonic() - began < 1.0
    gate.set()
    pool.close()
