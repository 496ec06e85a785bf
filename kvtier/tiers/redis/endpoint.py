"""Connections to a Redis or Valkey server, or to the nodes of a cluster. redis-py makes them: TLS, users, databases, cluster slots."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
import redis.cluster
import redis.sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, RedisClusterException, RedisError
from redis.retry import Retry

from kvtier.errors import RemoteError
from kvtier.tiers.redis.wire import Wire
from kvtier.tiers.remote.bounded_calls import BoundedCalls, CallsAbortedError
from kvtier.tiers.remote.deadline import Deadline

_CONNECT_ERRORS = (RedisError, RedisClusterException, OSError, UnicodeError)
"""RedisClusterException is no RedisError; UnicodeError: a host that can be none"""
_NUM_CONNECTING = 8
"""connections that may be under way at once"""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAccess:
    """Where the server is and how to get in. ``repr`` shows no password."""

    url: str
    """``redis://host:port/db``, ``rediss://...`` (TLS) or ``unix:///path``; no user or password in here"""
    username: str | None = None
    password: str | None = None
    ca_file: str | None = None
    """certificates that vouch for the server; None: the system's"""
    cluster: bool = False
    sentinel: str | None = None
    """name of the primary; ``url`` then names sentinels: ``redis://host:port,host:port/db``"""
    connect_timeout_s: float = 1.0
    stall_timeout_s: float = 1.0
    """longest time without a byte"""

    def __repr__(self) -> str:
        return f"RedisAccess({self.address})"

    @property
    def address(self) -> str:
        """For messages."""
        return f"{self.url} (user {self.username or 'default'})"


class Endpoint:
    """Hands out connected wires. Thread-safe."""

    def __init__(self, access: RedisAccess) -> None:
        """Does not connect. Raises ValueError where the URL is none."""
        self._access = access
        self._options = _options(access)
        self._lock = threading.Lock()
        self._wires: dict[Any, Wire] = {}
        """by redis-py's connection"""
        self._calls = BoundedCalls(_NUM_CONNECTING, "kvtier-redis-connect")
        self._asking = threading.Lock()
        """held while a cluster is asked who keeps what"""
        self._is_aborted = False
        self._cluster: redis.RedisCluster | None = None
        self._may_have_moved = False
        """names of the cluster may be kept elsewhere by now"""
        self._pool = None if access.cluster else _pool(access, self._options)

    def pool_for(self, name: str, deadline: Deadline) -> Any:
        """The connection pool of the server that keeps a name."""
        if self._pool is not None:
            return self._pool
        try:
            cluster = self._cluster
            if cluster is None or self._may_have_moved:
                cluster = self._call(self._current_cluster, deadline)
            node = cluster.get_node_from_key(name)
        except RemoteError:
            raise
        except _CONNECT_ERRORS as error:
            self._may_have_moved = True
            raise self._failure(error) from error
        if node is None or node.redis_connection is None:
            raise RemoteError("connect_errors", f"{self._access.address}: no node keeps {name}")
        return node.redis_connection.connection_pool

    @contextmanager
    def wire(self, pool: Any, deadline: Deadline) -> Iterator[Wire]:
        """A connection, to itself; given back where nothing was raised, else closed."""
        connection = self._connection(pool, deadline)
        wire = Wire(connection._sock, self._access.address, self._access.stall_timeout_s)
        is_clean = False
        try:
            with self._lock:
                self._check_open()  # aborted while it connected
                self._wires[connection] = wire
            yield wire
            is_clean = True
        finally:
            with self._lock:
                self._wires.pop(connection, None)
            if not is_clean:
                connection.disconnect()
                self._may_have_moved = True
            pool.release(connection)

    @property
    def has_sentinel(self) -> bool:
        """Whether sentinels say who the primary is, each time a connection is made."""
        return self._access.sentinel is not None

    def abort(self) -> None:
        """Makes every wire fail, those to come too."""
        with self._lock:
            self._is_aborted = True
            for wire in self._wires.values():
                wire.abort()
        self._calls.abort()

    def close(self) -> None:
        """Closes what is idle."""
        self._calls.close()
        if self._pool is not None:
            self._pool.disconnect()
        for node in [] if self._cluster is None else self._cluster.get_nodes():
            _disconnect(node)

    def _current_cluster(self) -> redis.RedisCluster:
        """The cluster, asked anew who keeps what after anything went wrong: a replica may have taken over, or names may have moved."""
        with self._asking:
            if self._cluster is None:
                self._cluster = redis.RedisCluster.from_url(self._access.url, **self._options)
            elif self._may_have_moved:
                self._may_have_moved = False
                before = self._cluster.get_nodes()
                self._cluster.nodes_manager.initialize()
                for node in before:
                    if self._cluster.get_node(node_name=node.name) is None:
                        _disconnect(node, with_busy=False)
            return self._cluster

    def _connection(self, pool: Any, deadline: Deadline) -> Any:
        """Of redis-py, which resolves names and speaks to the server before it gives one out, within no deadline."""

        def dispose(connection: Any) -> None:
            connection.disconnect()
            pool.release(connection)

        self._check_open()
        try:
            return self._call(pool.get_connection, deadline, dispose)
        except RemoteError:
            raise
        except _CONNECT_ERRORS as error:
            self._may_have_moved = True
            if isinstance(error, TimeoutError):
                self._end_handshakes(pool)
            raise self._failure(error) from error

    def _call(self, work: Callable[[], _T], deadline: Deadline, dispose: Callable[[_T], object] = lambda _: None) -> _T:
        try:
            return self._calls.call(work, deadline, dispose=dispose)
        except CallsAbortedError as error:
            raise self._closing() from error

    def _end_handshakes(self, pool: Any) -> None:
        """Lets connections that nobody waits for go, or a server that sends and sends would fill the memory."""
        with self._lock:
            for connection in set(pool._in_use_connections) - self._wires.keys():
                if connection._sock is not None:
                    with contextlib.suppress(OSError):
                        connection._sock.shutdown(socket.SHUT_RDWR)

    def _check_open(self) -> None:
        if self._is_aborted:
            raise self._closing()

    def _closing(self) -> RemoteError:
        return RemoteError("connect_errors", f"{self._access.address}: the tier is closing", may_pass=False)

    def _failure(self, error: Exception) -> RemoteError:
        where = self._access.address
        if isinstance(error, (AuthenticationError, AuthorizationError)):
            return RemoteError("auth_errors", f"{where}: the server does not let this user in: {error}", may_pass=False)
        event = "timeouts" if isinstance(error, (redis.TimeoutError, TimeoutError)) else "connect_errors"
        return RemoteError(event, f"{where}: {error}")


def _disconnect(node: redis.cluster.ClusterNode, *, with_busy: bool = True) -> None:
    """Closes a node's connections, which redis-py leaves to us. ``with_busy``: also those that somebody has."""
    if node.redis_connection is not None:
        node.redis_connection.connection_pool.disconnect(inuse_connections=with_busy)


def _pool(access: RedisAccess, options: dict[str, Any]) -> redis.ConnectionPool:
    if access.sentinel is None:
        return redis.ConnectionPool.from_url(access.url, **options)
    scheme, _, rest = access.url.partition("://")
    hosts, _, database = rest.partition("/")
    places = [(host.strip("[]"), int(port)) for host, _, port in (place.rpartition(":") for place in hosts.split(","))]
    own = {name: options[name] for name in ("socket_connect_timeout", "socket_timeout", "retry")}
    sentinel = redis.sentinel.Sentinel(places, sentinel_kwargs=own)
    more = {"ssl": True} if scheme == "rediss" else {}
    return redis.sentinel.SentinelConnectionPool(access.sentinel, sentinel, db=int(database or 0), **options, **more)


def _options(access: RedisAccess) -> dict[str, Any]:
    options: dict[str, Any] = {
        "socket_connect_timeout": access.connect_timeout_s,
        "socket_timeout": access.stall_timeout_s,
        "username": access.username,
        "password": access.password,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
    }
    if access.ca_file is not None:
        options["ssl_ca_certs"] = access.ca_file
    return options
